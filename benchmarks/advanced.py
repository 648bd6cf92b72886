"""What the methods are worth: the demo model on SST-5 and CFIMDB, in one table and one picture.

    .venv/bin/python -m pip install -r benchmarks/requirements.txt
    .venv/bin/python -m benchmarks.advanced

A row's one hyperparameter is tuned on SST-5's dev with one seed; then three other seeds run. The
first two rows and those that are best on SST-5's dev run on CFIMDB too, with the same value. For
the time, all rows take turns in training on a part of SST-5, three times; that needs an idle
machine. All runs are processes that can be killed; what `benchmarks/results/` has does not run
again. `--only PART` runs the rows with that in their name, on SST-5, and prints no table.
"""

import argparse
import functools
import json
import random
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, median_low, stdev

import matplotlib.pyplot as plt
from matplotlib.transforms import offset_copy

from benchmarks.baseline import STRENGTHS, baseline
from benchmarks.runs import DEMO, ROOT, classify, read_records, run_llama, spread
from dataset import load_label_names, read_labelled
from evaluation import append_metrics
from utils import atomic_write

RESULTS = ROOT / "benchmarks/results"
ADVANCED = RESULTS / "advanced.jsonl"
SST, CFIMDB = (str(ROOT / "data" / name) for name in ("sst", "cfimdb"))
EPOCHS, BATCH_SIZES = 5, {SST: 80, CFIMDB: 10}
TUNING_SEED, SEEDS = 1337, (1, 2, 3)
N_BEST = 3  # of the rows run on CFIMDB
N_ROUNDS, TIMED = 3, {"epochs": 1, "shots": 300}  # an epoch of 1,500 sentences
PRETRAINING_STEPS = 20  # that are timed

RATES = (2e-4, 5e-4, 1e-3)
HIGH_RATES = (1e-3, 2e-3, 5e-3)
CAUSAL = {"causal": True, "dtype": "bfloat16", "lr": 5e-4}
SHOTS = CAUSAL | {"shots": 64, "batch_size": 8}
TEMPLATE = {"prompt_template": "{sentence} It was"}
PROMPT = {"prompt_based": True} | TEMPLATE
LABEL_WORDS = {  # each is one token of the demo model
    SST: "benchmarks/sst-label-words.json",
    CFIMDB: "data/cfimdb-label-mapping.json",
}
ALPHAS = [0, 0.2, 0.4, 0.6, 0.8, 1]
LABELLED = CAUSAL | {"labels": True, "lr": 2e-4}
ZERO_SHOT = {"causal": True, "batch_size": 10}


@dataclass
class Row:
    """Flags, the one that is tuned, and its values.

    "steps" and "labels" are those of `pretrain_on_tasks`; "steps" may be another row's name, whose
    best value is taken.
    """

    label: str
    flags: dict[str, object]
    tuned: str
    values: tuple

    def settings(self, data: str, value: object, seed: int) -> dict:
        """All flags of a run."""
        settings = {"batch_size": BATCH_SIZES[data], "epochs": EPOCHS} | self.flags
        if "prompt_based" in settings:
            settings["label-names"] = LABEL_WORDS[data]
        return settings | {self.tuned: value, "seed": seed}


DEFAULT, PLAIN = "a unmasked float32", "d causal bfloat16"  # also the names in accuracy.jsonl
ROWS = {
    DEFAULT: Row("the assignment's default: unmasked, float32", {"no-causal": True}, "lr", RATES),
    PLAIN: Row("plain: causal, bfloat16", CAUSAL, "lr", RATES),
    "continued": Row("continued pre-training", CAUSAL, "steps", (250, 500, 1000)),
    "mean": Row("mean pooling", CAUSAL | {"pooling": "mean"}, "lr", RATES),
    "words": Row("the head begins as the label words", CAUSAL | {"wise_ft": [1]}, "lr", RATES),
    "wise": Row("WiSE-FT, α of 0, 0.2 … 1, that head", CAUSAL | {"wise_ft": ALPHAS}, "lr", RATES),
    "prompt": Row("prompt-based", CAUSAL | PROMPT, "lr", RATES),
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
    "labelled": Row(
        "continued pre-training with the labels, prompt-based",
        LABELLED | PROMPT,
        "steps",
        (125, 250, 500),
    ),
    "labelled mean": Row(
        "continued pre-training with the labels, mean pooling",
        LABELLED | {"steps": "labelled", "pooling": "mean"},
        "lr",
        (1e-4, 2e-4, 5e-4),
    ),
    "few": Row("64 sentences a label: plain", SHOTS, "lr", RATES),
    "few prompt": Row("64 sentences a label: prompt-based", SHOTS | PROMPT, "lr", RATES),
    "few lora": Row("64 sentences a label: LoRA", SHOTS | {"tune": "lora"}, "lr", HIGH_RATES),
}
PROMPTS = {
    "zero-shot, the assignment's prompt": ZERO_SHOT,
    "zero-shot, “It was”": ZERO_SHOT | TEMPLATE,
    "zero-shot, “It was”, contextual calibration": ZERO_SHOT
    | TEMPLATE
    | {"calibrate": "contextual"},
    "zero-shot, “It was”, PMI": ZERO_SHOT | TEMPLATE | {"calibrate": "pmi"},
}
BASELINE = "TF-IDF, logistic regression"
HEADER = ["", "best of", "SST-5 dev", "SST-5 test", "CFIMDB dev", "trained", "time", "GiB"]


def task_lines(data: str, labels: bool) -> list[str]:
    """The lines of train, as they are or with the labels in words behind every sentence.

    For the latter, reviews are cut into sentences, each of which has its review's label.
    """
    train = Path(f"{data}-train.txt")
    if not labels:
        return train.read_text(encoding="utf-8").splitlines(keepends=True)
    words = load_label_names(ROOT / LABEL_WORDS[data])
    return [
        f"{label} ||| {TEMPLATE['prompt_template'].format(sentence=sentence)} {words[label]}\n"
        for label, review in read_labelled(train)
        for sentence in re.split(r"(?<=\w [.!?]) ", review)
        if re.search(r"\w", sentence)
    ]


def pretrain_on_tasks(steps: int, labels: bool, folder: Path | None = None) -> Path:
    """Continue the demo model's pre-training on the sentences of both trains, shuffled.

    Args:
        labels: whether the sentences end in their labels.
        folder: where the run is kept; None is for one of its own.

    Returns:
        the checkpoint.
    """
    folder = folder or RESULTS / f"{'labelled' if labels else 'continued'}-{steps}"
    lines = [line for data in (SST, CFIMDB) for line in task_lines(data, labels)]
    random.Random(0).shuffle(lines)
    folder.parent.mkdir(parents=True, exist_ok=True)
    text = folder.with_suffix(".txt")
    with atomic_write(text) as file:
        file.writelines(lines)
    flags = {
        "option": "pretrain",
        "pretrained-model-path": DEMO,
        "text": text,
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
    labels = settings.pop("labels", False)
    if (steps := settings.pop("steps", None)) is None:
        return classify(ADVANCED, name, data, settings)
    if isinstance(steps, str):
        steps, _ = tuned_value(steps)
    start = functools.partial(pretrain_on_tasks, steps, labels)
    return classify(ADVANCED, f"{name}, {steps} steps", data, settings, start)


def tuned_value(name: str) -> tuple[object, dict]:
    """The best value of a row's hyperparameter on SST-5's dev, and the accuracy of each."""
    runs = {value: train(name, SST, value, TUNING_SEED) for value in ROWS[name].values}
    accuracies = {value: run["dev"]["accuracy"] for value, run in runs.items()}
    return max(accuracies, key=accuracies.get), accuracies


def final_runs(name: str, data: str) -> list[dict]:
    """A row's runs with all seeds."""
    value, _ = tuned_value(name)
    return [train(name, data, value, seed) for seed in SEEDS]


def measured(name: str, what: str) -> int:
    """The median of a row's runs; those that diverged, and older records, may not have it."""
    return median_low(record[what] for record in final_runs(name, SST) if what in record)


def run_rows(only: str) -> None:
    """Run what is missing on SST-5, of the rows with `only` in their name."""
    for name in ROWS:
        if only in name:
            value, accuracies = tuned_value(name)
            dev = spread(final_runs(name, SST), "dev")
            print(f"{name}: {dev} with {value} of {accuracies}", flush=True)


def best_rows() -> list[str]:
    """Those with the highest mean on SST-5's dev, among the methods that see all of train."""
    means = {
        name: mean(record["dev"]["accuracy"] for record in final_runs(name, SST))
        for name in ROWS
        if name not in (DEFAULT, PLAIN) and "few" not in name
    }
    return sorted(means, key=means.get, reverse=True)[:N_BEST]


@functools.cache
def times() -> dict[str, float]:
    """Every row's seconds of training as a multiple of plain's, the median of all rounds.

    Continued pre-training is added, as a multiple of plain's epochs on all of SST-5.
    """
    n_sentences = len(read_labelled(f"{SST}-train.txt"))
    n_timed = 5 * TIMED["shots"]
    ratios: dict[str, list[float]] = {name: [] for name in ROWS if "few" not in name}
    for round_number in range(N_ROUNDS):
        seconds = {
            name: train(name, SST, tuned_value(name)[0], round_number, **TIMED)["train_seconds"]
            for name in ratios
        }
        plain = seconds[PLAIN]
        whole = EPOCHS * plain * n_sentences / n_timed
        step = seconds_of_a_step(round_number)
        for name in ratios:
            ratios[name].append(seconds[name] / plain + pretraining_steps(name) * step / whole)
    return {name: median(values) for name, values in ratios.items()}


def pretraining_steps(name: str) -> int:
    """Of `pretrain_on_tasks`, before a row's fine-tuning."""
    row = ROWS[name]
    steps = tuned_value(name)[0] if row.tuned == "steps" else row.flags.get("steps", 0)
    return tuned_value(steps)[0] if isinstance(steps, str) else steps


def seconds_of_a_step(round_number: int) -> float:
    """The time of `pretrain_on_tasks`, from a few steps."""
    identity = {"name": "time of pre-training", "round": round_number}
    for record in read_records(RESULTS):
        if identity.items() <= record.items():
            return record["seconds"] / PRETRAINING_STEPS
    with tempfile.TemporaryDirectory() as folder:
        pretrain_on_tasks(PRETRAINING_STEPS, labels=False, folder=Path(folder, "run"))
        lines = Path(folder, "run/metrics.jsonl").read_text().splitlines()
    seconds = max(json.loads(line).get("seconds", 0.0) for line in lines)
    append_metrics(ADVANCED, **identity, seconds=seconds)
    return seconds / PRETRAINING_STEPS


def print_table() -> None:
    """The table in Markdown; what is missing runs."""
    on_cfimdb = [DEFAULT, PLAIN, *best_rows()]
    lines = [trained_cells(name, name in on_cfimdb) for name in ROWS]
    lines.insert(2, baseline_cells())
    lines.append(few_shot_baseline_cells())
    lines += [prompted_cells(label, flags) for label, flags in PROMPTS.items()]
    for cells in (HEADER, ["---"] * len(HEADER), *lines):
        print(f"| {' | '.join(cells)} |")


def trained_cells(name: str, on_cfimdb: bool) -> list[str]:
    """A row of the table: what is fine-tuned."""
    row, records = ROWS[name], final_runs(name, SST)
    best, accuracies = tuned_value(name)
    values = ", ".join(f"**{value}**" if value == best else f"{value}" for value in accuracies)
    return [
        row.label,
        f"`{row.tuned}` {values}",
        spread(records, "dev"),
        spread(records, "test"),
        spread(final_runs(name, CFIMDB), "dev") if on_cfimdb else "",
        f"{measured(name, 'trained_parameters'):,}",
        f"{times()[name]:.1f}" if name in times() else "",
        f"{measured(name, 'peak_memory_bytes') / 2**30:.1f}",
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
        f"{sst['seconds']:.0f} s",
        "",
    ]


def few_shot_baseline_cells() -> list[str]:
    """A row of the table: the same, on the sentences that the few-shot rows see."""
    records = [baseline(SST, SHOTS["shots"], seed) for seed in SEEDS]
    return [
        f"64 sentences a label: {BASELINE}",
        f"`C` {', '.join(map(str, STRENGTHS))}",
        spread(records, "dev"),
        spread(records, "test"),
        "",
        f"{median(record['trained_parameters'] for record in records):,}",
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
    """Accuracy on SST-5's dev against trained parameters; where these are equal, side by side."""
    plt.rcParams["svg.hashsalt"] = "minllama"  # the same picture is the same file
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    axes.set(xscale="log", xlabel="trained parameters", ylabel="accuracy on SST-5's dev")
    points = []
    for name, row in ROWS.items():
        if "few" in name:
            continue
        accuracies = [record["dev"]["accuracy"] for record in final_runs(name, SST)]
        accuracy, deviation = mean(accuracies), stdev(accuracies)
        trained = measured(name, "trained_parameters")
        n_there = sum(x == trained for _, x, *_ in points)
        beside = offset_copy(axes.transData, figure, x=-2.5 * n_there, units="points")
        points.append((accuracy, trained, row.label, beside))
        style = {"fmt": "o", "ms": 4, "lw": 0.8, "capsize": 2, "transform": beside}
        axes.errorbar(trained, accuracy, yerr=deviation, **style)
        axes.update_datalim([(trained, accuracy - deviation), (trained, accuracy + deviation)])
    points.sort(key=lambda point: point[0])
    for i, (accuracy, trained, label, beside) in enumerate(points):
        # The labels stand beside the axes, in order.
        axes.annotate(
            label,
            (trained, accuracy),
            xycoords=beside,
            xytext=(1.03, (i + 0.5) / len(points)),
            textcoords="axes fraction",
            verticalalignment="center",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "lw": 0.3, "relpos": (0, 0.5)},
        )
    axes.axhline(baseline(SST)["dev"]["accuracy"], ls="--", color="grey", label=BASELINE)
    axes.autoscale_view()
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


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
