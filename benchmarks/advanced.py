"""What the methods are worth: the demo model on SST-5 and CFIMDB, in one table and one picture.

    .venv/bin/python -m pip install -r benchmarks/requirements.txt
    .venv/bin/python -m benchmarks.advanced

A row's one hyperparameter is tuned on SST-5's dev with one seed; then two more seeds run. The
first two rows and those that are best on SST-5's dev run on CFIMDB too, with the same value. Each
row also runs for one epoch on its own, from which the table has time and memory. All runs are
processes that can be killed; what `benchmarks/results/` has does not run again.
"""

import argparse
import functools
import subprocess
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import matplotlib.pyplot as plt

from benchmarks.baseline import STRENGTHS, baseline
from benchmarks.runs import DEMO, ROOT, classify, run_llama, spread

RESULTS = ROOT / "benchmarks/results"
ADVANCED = RESULTS / "advanced.jsonl"
SST, CFIMDB = (str(ROOT / "data" / name) for name in ("sst", "cfimdb"))
BATCH_SIZES = {SST: 80, CFIMDB: 10}
SEEDS = (1337, 1, 2)
N_BEST = 3  # of the rows run on CFIMDB
RATES = (2e-4, 5e-4, 1e-3)
HIGH_RATES = (1e-3, 2e-3, 5e-3)
CAUSAL = {"causal": True, "dtype": "bfloat16", "lr": 5e-4}
SHOTS = CAUSAL | {"shots": 64, "batch_size": 8}
PROMPT = {"prompt_based": True, "prompt_template": "{sentence} It was"}
ALPHAS = [0, 0.2, 0.4, 0.6, 0.8, 1]


@dataclass
class Row:
    """Flags, the one that is tuned, and its values; "steps" are those of `pretrain_on_tasks`."""

    label: str
    flags: dict[str, object]
    tuned: str | None = None
    values: tuple = ()

    def settings(self, data: str, value: object, seed: int) -> dict:
        """All flags of a run."""
        settings = {"batch_size": BATCH_SIZES[data], "epochs": 5} | self.flags
        return settings | ({} if self.tuned is None else {self.tuned: value}) | {"seed": seed}


DEFAULT, PLAIN = "a unmasked float32", "d causal bfloat16"  # also the names in accuracy.jsonl
ROWS = {
    DEFAULT: Row("the assignment's default: unmasked, float32", {"no-causal": True}, "lr", RATES),
    PLAIN: Row("plain: causal, bfloat16", CAUSAL, "lr", RATES),
    "continued": Row("continued pre-training", CAUSAL, "steps", (250, 500, 1000)),
    "mean": Row("mean pooling", CAUSAL | {"pooling": "mean"}, "lr", RATES),
    "prompt": Row("prompt-based", CAUSAL | PROMPT, "lr", RATES),
    "wise": Row("WiSE-FT", CAUSAL | {"wise_ft": ALPHAS}, "lr", RATES),
    "lora": Row("LoRA", CAUSAL | {"tune": "lora"}, "lr", HIGH_RATES),
    "adapter": Row("adapters", CAUSAL | {"tune": "adapter"}, "lr", HIGH_RATES),
    "prefix": Row("prefix", CAUSAL | {"tune": "prefix"}, "lr", (2e-3, 5e-3, 1e-2)),
    "norm": Row("the norms' scales", CAUSAL | {"tune": "norm"}, "lr", (2e-3, 5e-3, 1e-2)),
    "head": Row("the head only", CAUSAL | {"tune": "head"}, "lr", (2e-3, 1e-2, 5e-2)),
    "mixout": Row("Mixout", CAUSAL, "mixout", (0.1, 0.3, 0.6)),
    "decay": Row("layer-wise rates", CAUSAL, "layer_decay", (0.6, 0.75, 0.9)),
    "schedule": Row(
        "warm-up and linear decay", CAUSAL | {"lr_schedule": "linear", "warmup": 0.1}, "lr", RATES
    ),
    "smart": Row("SMART", CAUSAL, "smart", (0.3, 1.0, 3.0)),
    "combination 1": Row(
        "continued pre-training, mean pooling",
        CAUSAL | {"steps": 1000, "pooling": "mean"},
        "lr",
        RATES,
    ),
    "combination 2": Row(
        "continued pre-training, mean pooling, WiSE-FT",
        CAUSAL | {"steps": 1000, "pooling": "mean", "wise_ft": ALPHAS},
        "lr",
        RATES,
    ),
    "few": Row("64 sentences a label: plain", SHOTS, "lr", RATES),
    "few prompt": Row("64 sentences a label: prompt-based", SHOTS | PROMPT, "lr", RATES),
    "few lora": Row("64 sentences a label: LoRA", SHOTS | {"tune": "lora"}, "lr", HIGH_RATES),
}
ZERO_SHOT = {"causal": True, "batch_size": 10}
PROMPTS = {
    "zero-shot": ZERO_SHOT,
    "zero-shot, contextual calibration": ZERO_SHOT | {"calibrate": "contextual"},
    "zero-shot, PMI": ZERO_SHOT | {"calibrate": "pmi"},
}
HEADER = ["", "best of", "SST-5 dev", "SST-5 test", "CFIMDB dev", "trained", "time", "GiB"]
BASELINE = "TF-IDF, logistic regression"


def pretrain_on_tasks(steps: int) -> Path:
    """Continue the demo model's pre-training on the sentences of both trains."""
    folder = RESULTS / f"continued-{steps}"
    flags = {
        "option": "pretrain",
        "pretrained-model-path": DEMO,
        "text": [f"{SST}-train.txt", f"{CFIMDB}-train.txt"],
        "output_dir": folder,
        "split": [0.9, 0.05, 0.05],
        "max_seq_len": 256,
        "batch_size": 32,
        "steps": steps,
        "dropout": 0.1,
        "attention_dropout": 0,
        "dtype": "bfloat16",
    }
    subprocess.run(run_llama(flags), stdout=subprocess.DEVNULL, check=True)
    return folder / "model.pt"


def train(name: str, data: str, value: object, seed: int, **changes: object) -> dict:
    """One run of a row."""
    settings = ROWS[name].settings(data, value, seed) | changes
    if (steps := settings.pop("steps", None)) is None:
        return classify(ADVANCED, name, data, settings)
    start = functools.partial(pretrain_on_tasks, steps)
    return classify(ADVANCED, f"{name} {steps}", data, settings, start)


def tuned_value(name: str) -> tuple[object, dict]:
    """The best value of a row's hyperparameter on SST-5's dev, and the accuracy of each."""
    row = ROWS[name]
    if row.tuned is None:
        return None, {}
    runs = {value: train(name, SST, value, SEEDS[0]) for value in row.values}
    accuracies = {value: run["dev"]["accuracy"] for value, run in runs.items()}
    return max(accuracies, key=accuracies.get), accuracies


def final_runs(name: str, data: str) -> list[dict]:
    """A row's runs with all seeds."""
    value, _ = tuned_value(name)
    return [train(name, data, value, seed) for seed in SEEDS]


def mean_accuracy(records: list[dict]) -> float:
    return mean(record["dev"]["accuracy"] for record in records)


def best_rows() -> list[str]:
    """Those with the highest mean on SST-5's dev, among the methods that see all of train."""
    methods = [name for name in ROWS if name not in (DEFAULT, PLAIN) and "few" not in name]
    return sorted(methods, key=lambda name: -mean_accuracy(final_runs(name, SST)))[:N_BEST]


def run_rows(only: str) -> None:
    """Run what is missing on SST-5, of the rows with `only` in their name."""
    for name in ROWS:
        if only in name:
            value, accuracies = tuned_value(name)
            dev = spread(final_runs(name, SST), "dev")
            print(f"{name}: {dev} with {value} of {accuracies}", flush=True)


def print_table() -> None:
    """The table in Markdown; what is missing runs. Time is that of training, plain being 1."""
    on_cfimdb = [DEFAULT, PLAIN, *best_rows()]
    lines = [trained_cells(name, name in on_cfimdb) for name in ROWS]
    lines.insert(2, baseline_cells())
    lines += [prompted_cells(label, flags) for label, flags in PROMPTS.items()]
    for cells in (HEADER, ["---"] * len(HEADER), *lines):
        print(f"| {' | '.join(cells)} |")


def first_epoch(name: str) -> dict:
    """A run of one epoch, for time and memory."""
    return train(name, SST, tuned_value(name)[0], SEEDS[0], epochs=1)


def trained_cells(name: str, on_cfimdb: bool) -> list[str]:
    """A row of the table: what is fine-tuned."""
    row, records, epoch = ROWS[name], final_runs(name, SST), first_epoch(name)
    best, accuracies = tuned_value(name)
    values = ", ".join(f"**{value}**" if value == best else f"{value}" for value in accuracies)
    return [
        row.label,
        f"`{row.tuned}` {values}",
        spread(records, "dev"),
        spread(records, "test"),
        spread(final_runs(name, CFIMDB), "dev") if on_cfimdb else "",
        f"{epoch['trained_parameters']:,}",
        f"{epoch['train_seconds'] / first_epoch(PLAIN)['train_seconds']:.1f}",
        f"{epoch['peak_memory_bytes'] / 2**30:.1f}",
    ]


def baseline_cells() -> list[str]:
    """A row of the table: what a sceptic would use."""
    sst, cfimdb = baseline(SST), baseline(CFIMDB)
    accuracies = (sst["dev"], sst["test"], cfimdb["dev"])
    return [
        BASELINE,
        f"`C` {', '.join(map(str, STRENGTHS))}",
        *(f"{split['accuracy']:.3f}" for split in accuracies),
        f"{sst['trained_parameters']:,}",
        "",
        "",
    ]


def prompted_cells(label: str, flags: dict) -> list[str]:
    """A row of the table: prompting, which trains nothing."""
    sst, cfimdb = (
        classify(ADVANCED, label, data, flags, option="prompt") for data in (SST, CFIMDB)
    )
    accuracies = (sst["dev"], sst["test"], cfimdb["dev"])
    return [label, "", *(f"{split['accuracy']:.3f}" for split in accuracies), "0", "", ""]


def draw(path: Path) -> None:
    """Accuracy on SST-5's dev against trained parameters."""
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    points = []
    for name, row in ROWS.items():
        if "few" in name:
            continue
        accuracies = [record["dev"]["accuracy"] for record in final_runs(name, SST)]
        trained = first_epoch(name)["trained_parameters"]
        while any(x == trained for _, x, _ in points):
            trained *= 1.07  # beside each other, so that all bars are seen
        points.append((mean(accuracies), trained, row.label))
        axes.errorbar(*points[-1][1::-1], yerr=stdev(accuracies), fmt="o", ms=4, lw=0.8, capsize=2)
    points.sort()
    for i, (accuracy, trained, label) in enumerate(points):  # the labels beside the axes, in order
        axes.annotate(
            label,
            (trained, accuracy),
            xytext=(1.03, (i + 0.5) / len(points)),
            textcoords="axes fraction",
            verticalalignment="center",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "lw": 0.3, "relpos": (0, 0.5)},
        )
    axes.axhline(baseline(SST)["dev"]["accuracy"], ls="--", color="grey", label=BASELINE)
    axes.set(xscale="log", xlabel="trained parameters", ylabel="accuracy on SST-5's dev")
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    help = "tune and run only rows with this in their name, on SST-5; print no table"
    parser.add_argument("--only", metavar="PART", help=help)
    args = parser.parse_args()
    run_rows(args.only or "")
    if args.only is None:
        print_table()
        draw(RESULTS / "advanced.svg")


if __name__ == "__main__":
    main()
