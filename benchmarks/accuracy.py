"""The same accuracy? The demo model, fine-tuned on SST-5 in the default mode and causally.

    .venv/bin/python -m benchmarks.accuracy

5 epochs in batches of 80, (a) unmasked in float32 and (d) causally in bfloat16. The learning rate
is chosen for each on dev, with one seed; then two more seeds run. Beside that (c) and (d),
causally in float32 and bfloat16, learn the demo reviews with as many seeds: their losses should not
differ by more than those of two seeds. Results are kept in `benchmarks/results/accuracy.jsonl`;
without it they run again.
"""

import argparse
import functools
from pathlib import Path
from statistics import mean, stdev

from benchmarks.runs import ROOT, classify, spread

WAYS = {
    "a unmasked float32": {"no-causal": True},
    "c causal float32": {"causal": True},
    "d causal bfloat16": {"causal": True, "dtype": "bfloat16"},
}
REVIEWS = ROOT / "data/demo/reviews"
RATES = (1e-4, 2e-4, 5e-4, 1e-3)
SEEDS = (1337, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="data/sst", help="path up to -train.txt")
    parser.add_argument("--batch_size", type=int, default=80)
    parser.add_argument("--epochs", type=int, default=5)
    results = ROOT / "benchmarks/results/accuracy.jsonl"
    parser.add_argument("--results", type=Path, default=results)
    args = parser.parse_args()

    def run(name: str, lr: float, seed: int, data: str, batch_size: int) -> dict:
        flags = {"batch_size": batch_size, "epochs": args.epochs, "lr": lr, "seed": seed}
        return classify(args.results, name, data, WAYS[name] | flags)

    for name in ("a unmasked float32", "d causal bfloat16"):
        on_sst = functools.partial(run, name, data=args.data, batch_size=args.batch_size)
        first = {lr: on_sst(lr, SEEDS[0])["dev"]["accuracy"] for lr in RATES}
        lr = max(first, key=first.get)
        print(f"{name}: dev by learning rate: {first}")
        records = [on_sst(lr, seed) for seed in SEEDS]
        print(f"{name}: lr {lr:g}: dev {spread(records, 'dev')}, test {spread(records, 'test')}")
    for name in ("c causal float32", "d causal bfloat16"):
        records = [run(name, 5e-4, seed, str(REVIEWS), 8) for seed in SEEDS]
        losses = zip(*(record["train_loss"] for record in records), strict=True)
        curve = ", ".join(f"{mean(epoch):.3f} ± {stdev(epoch):.3f}" for epoch in losses)
        print(f"{name}: train loss on the reviews by epoch: {curve}")


if __name__ == "__main__":
    main()
