"""Every method against plain fine-tuning: the demo model on SST-5 and CFIMDB, one table.

    .venv/bin/python -m pip install -r benchmarks/requirements.txt
    .venv/bin/python -m benchmarks.advanced [--only PART]

A row's one hyperparameter is tuned on SST-5's dev with one seed; then two more seeds run, and those
rows in `ON_CFIMDB` run there with the same value. Every run is a process that can be killed; the
results are kept in `benchmarks/results/advanced.jsonl`, and what is there does not run again.
"""

import argparse
from pathlib import Path

from benchmarks.runs import ROOT, fine_tune, spread

SEEDS = (1337, 1, 2)
CAUSAL = {"causal": True, "dtype": "bfloat16"}
RATES = (2e-4, 5e-4, 1e-3)
# Name: flags, the flag that is tuned, its values.
ROWS = {
    "the assignment's default": ({"no-causal": True}, "lr", (1e-4, 2e-4, 5e-4)),
    "plain, causal": (CAUSAL, "lr", RATES),
    "mean pooling": (CAUSAL | {"pooling": "mean"}, "lr", RATES),
    "mixout": (CAUSAL | {"lr": 5e-4}, "mixout", (0.1, 0.3, 0.6)),
    "LoRA": (CAUSAL | {"tune": "lora"}, "lr", (1e-3, 2e-3, 5e-3)),
    "adapters": (CAUSAL | {"tune": "adapter"}, "lr", (1e-3, 2e-3, 5e-3)),
    "prefix": (CAUSAL | {"tune": "prefix"}, "lr", (2e-3, 5e-3, 1e-2)),
    "norms": (CAUSAL | {"tune": "norm"}, "lr", (2e-3, 5e-3, 1e-2)),
    "head": (CAUSAL | {"tune": "head"}, "lr", (2e-3, 1e-2, 5e-2)),
    "prompt-based": (CAUSAL | {"prompt_based": True}, "lr", (1e-4, 2e-4, 5e-4)),
    "SMART": (CAUSAL | {"lr": 5e-4}, "smart", (0.3, 1.0, 3.0)),
    "WiSE-FT": (CAUSAL | {"wise_ft": [0, 0.2, 0.4, 0.6, 0.8, 1]}, "lr", RATES),
    "layer-wise rates": (CAUSAL | {"lr": 5e-4}, "layer_decay", (0.6, 0.75, 0.9)),
    "warm-up and linear decay": (CAUSAL | {"lr_schedule": "linear", "warmup": 0.1}, "lr", RATES),
}
BATCH_SIZES = {"sst": 80, "cfimdb": 10}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="data/sst", help="path up to -train.txt")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--only", default="", metavar="PART", help="rows with this in their name")
    results = ROOT / "benchmarks/results/advanced.jsonl"
    parser.add_argument("--results", type=Path, default=results)
    args = parser.parse_args()
    batch_size = BATCH_SIZES[Path(args.data).name]

    for name, (flags, tuned, values) in ROWS.items():
        if args.only not in name:
            continue
        settings = {"batch_size": batch_size, "epochs": args.epochs} | flags

        def run(value: float, seed: int, name=name, settings=settings, tuned=tuned) -> dict:
            return fine_tune(args.results, name, args.data, settings | {tuned: value, "seed": seed})

        first = {value: run(value, SEEDS[0])["dev"]["accuracy"] for value in values}
        best = max(first, key=first.get)
        records = [run(best, seed) for seed in SEEDS]
        print(f"{name}: {tuned} {best:g}: dev {spread(records, 'dev')}, {first}")


if __name__ == "__main__":
    main()
