"""What the methods are worth: the demo model on SST-5 and CFIMDB, in one table and one picture.

    .venv/bin/python -m pip install -r benchmarks/requirements.txt
    .venv/bin/python -m benchmarks.advanced

A row's one hyperparameter is tuned on SST-5's dev with one seed, if it has several values; then
three other seeds run. The reference rows and those that are best on SST-5's dev run on CFIMDB too,
with the same value. For the time, all rows but those of few sentences take turns in training on a
part of SST-5, twice; that needs an idle machine. Every run is a process, and all can be killed:
what `benchmarks/results/advanced.jsonl` has does not run again, only checkpoints that it needs are
made again. `--only PART` runs the rows with that in their name, on SST-5, and prints no table.
"""

import functools
import itertools
import json
import shutil
import subprocess
import tempfile
from argparse import RawDescriptionHelpFormatter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median, median_low

from benchmarks.baseline import CS, baseline
from benchmarks.runs import (
    DEMO,
    ROOT,
    accuracies,
    classify,
    end_on_sigterm,
    recorded,
    run_llama,
    spread,
)
from benchmarks.task_text import CFIMDB, LABEL_WORDS, SST, TEMPLATE, task_text
from dataset import read_labelled
from evaluation import check_metrics_file
from utils import ArgumentParser, InputError, atomic_write, run_script

RESULTS = ROOT / "benchmarks/results"
EPOCHS, BATCH_SIZES = 5, {SST: 80, CFIMDB: 10}
TUNING_SEED, SEEDS = 1337, (1, 2, 3)
N_BEST = 3  # of the methods run on CFIMDB
N_ROUNDS = 2
TIMED_LINES, TIMED_STRIDE = {"train": 1500, "dev": 100, "test": 100}, 5
TIMED_STEPS = 20  # of pre-training

RATES = (2e-4, 5e-4, 1e-3)
HIGH_RATES = (1e-3, 2e-3, 5e-3)
CAUSAL = {"causal": True, "dtype": "bfloat16", "lr": 5e-4}  # the rate that is plain's best
SHOTS = CAUSAL | {"shots": 64, "batch_size": 8}
LINEAR = {"lr_schedule": "linear", "warmup": 0.1}
PROMPT = {"prompt_based": True, "prompt_template": TEMPLATE}
ALPHAS = [0, 0.2, 0.4, 0.6, 0.8, 1]
ZERO_SHOT = {"causal": True, "batch_size": 10}
ZERO_SHOT_OURS = ZERO_SHOT | {"prompt_template": TEMPLATE}


@dataclass
class Row:
    """Flags, the one that is tuned, and its values.

    Attributes:
        corpus: what pre-training is continued on before: "sentences", "labelled" or nothing. Its
            number of steps is what is tuned, or
        steps_of: the best one of another row.
        on_cfimdb: flags that are added there.
    """

    label: str
    flags: dict[str, object]
    tuned: str
    values: tuple
    corpus: str | None = None
    steps_of: str | None = None
    on_cfimdb: dict[str, object] = field(default_factory=dict)

    def settings(self, data: str, value: object, seed: int) -> dict:
        """All flags of a run."""
        own = {} if self.tuned == "steps" else {self.tuned: value}
        own |= self.on_cfimdb if data == CFIMDB else {}
        common = {"batch_size": BATCH_SIZES[data], "epochs": EPOCHS}
        return with_label_words(common | self.flags | own | {"seed": seed}, data)


REFERENCE = {
    "default": Row(
        "the assignment's default: unmasked, float32 (on CFIMDB bfloat16)",
        {"no-causal": True},
        "lr",
        RATES,
        on_cfimdb={"dtype": "bfloat16"},
    ),
    "plain": Row("plain: causal, bfloat16", CAUSAL, "lr", RATES),
}
METHODS = {
    "continued": Row("continued pre-training", CAUSAL, "steps", (250, 500, 1000), "sentences"),
    "mean": Row("mean pooling", CAUSAL | {"pooling": "mean"}, "lr", RATES),
    "names": Row("the head begins as the labels' names", CAUSAL | {"wise_ft": [1]}, "lr", RATES),
    "wise": Row("WiSE-FT, α of 0, 0.2 … 1, that head", CAUSAL | {"wise_ft": ALPHAS}, "lr", RATES),
    "prompt": Row("prompt-based", CAUSAL | PROMPT, "lr", RATES),
    "lora": Row("LoRA", CAUSAL | {"tune": "lora"}, "lr", HIGH_RATES),
    "adapter": Row("adapters", CAUSAL | {"tune": "adapter"}, "lr", HIGH_RATES),
    "prefix": Row("prefix", CAUSAL | {"tune": "prefix"}, "lr", (2e-3, 5e-3, 1e-2)),
    "norm": Row("the norms' scales", CAUSAL | {"tune": "norm"}, "lr", (2e-3, 5e-3, 1e-2)),
    "head": Row("the head only", CAUSAL | {"tune": "head"}, "lr", (2e-3, 1e-2, 5e-2)),
    "mixout": Row("Mixout", CAUSAL, "mixout", (0.1, 0.3, 0.6)),
    "decay": Row("layer-wise rates", CAUSAL, "layer_decay", (0.6, 0.75, 0.9)),
    "schedule": Row("warm-up and linear decay", CAUSAL | LINEAR, "lr", RATES),
    "smart": Row("SMART", CAUSAL, "smart", (0.3,)),
    "labelled": Row(
        "continued pre-training with the labels, prompt-based",
        CAUSAL | PROMPT | {"lr": 2e-4},
        "steps",
        (250, 500, 1000),
        "labelled",
    ),
    "labelled mean": Row(
        "continued pre-training with the labels, mean pooling",
        CAUSAL | {"pooling": "mean"},
        "lr",
        (1e-4, 2e-4, 5e-4),
        "labelled",
        steps_of="labelled",
    ),
    "short": Row(
        "continued pre-training, mean pooling, linear decay",
        CAUSAL | {"pooling": "mean"} | LINEAR,
        "epochs",
        (1, 2, 3),
        "sentences",
        steps_of="continued",
    ),
}
FEW_SHOT = {
    "few": Row("64 sentences a label: plain", SHOTS, "lr", RATES),
    "few prompt": Row("64 sentences a label: prompt-based", SHOTS | PROMPT, "lr", RATES),
    "few lora": Row("64 sentences a label: LoRA", SHOTS | {"tune": "lora"}, "lr", HIGH_RATES),
}
ROWS = REFERENCE | METHODS | FEW_SHOT
PROMPTS = {
    "zero-shot, the assignment's prompt": ZERO_SHOT,
    "zero-shot, “It was”": ZERO_SHOT_OURS,
    "zero-shot, “It was”, contextual calibration": ZERO_SHOT_OURS | {"calibrate": "contextual"},
    "zero-shot, “It was”, PMI": ZERO_SHOT_OURS | {"calibrate": "pmi"},
}
BASELINE = "TF-IDF, logistic regression"
HEADER = ["", "best of", "SST-5 dev", "SST-5 test", "CFIMDB dev", "trained", "time / plain", "GiB"]


def with_label_words(flags: dict[str, object], data: str) -> dict[str, object]:
    """Our template's flags, completed by the labels that go with it."""
    return flags | ({"label-names": LABEL_WORDS[data]} if "prompt_template" in flags else {})


record = functools.partial(recorded, RESULTS / "advanced.jsonl")


def pretrain_on_tasks(corpus: str, steps: int, folder: Path | None = None) -> Path:
    """Continue the demo model's pre-training on the sentences of both trains, shuffled.

    Args:
        corpus: "sentences", or "labelled" where they end in their labels.
        folder: where the run is kept; None is for one of its own.

    Returns:
        the checkpoint.
    """
    folder = folder or RESULTS / f"{corpus}-{steps}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    text = folder.with_suffix(".txt")
    with atomic_write(text) as file:
        file.writelines(task_text(corpus == "labelled"))
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


def pretraining_steps(name: str, value: object) -> int:
    """Of `pretrain_on_tasks` before a row's run with a value of its hyperparameter."""
    row = ROWS[name]
    if row.corpus is None:
        return 0
    return value if row.steps_of is None else tuned_value(row.steps_of)[0]


def run_row(name: str, data: str, value: object, seed: int) -> dict:
    """One run of a row; what `classify` returns."""
    flags = ROWS[name].settings(data, value, seed)
    identity = {"name": name, "data": Path(data).name, "flags": flags}
    steps = pretraining_steps(name, value)
    if steps:
        identity["steps"] = steps

    def measure() -> dict:
        return classify(data, flags, pretrain_on_tasks(ROWS[name].corpus, steps) if steps else DEMO)

    return record(identity, measure)


def tuned_value(name: str) -> tuple[object, dict]:
    """The best value of a row's hyperparameter on SST-5's dev, and the accuracy of each.

    Where there is one value only, nothing runs, and its accuracy is None.
    """
    values = ROWS[name].values
    if len(values) == 1:
        return values[0], {values[0]: None}
    runs = {value: run_row(name, SST, value, TUNING_SEED) for value in values}
    found = {value: sum(accuracies([run], "dev")) for value, run in runs.items()}
    return max(found, key=found.get), found


def final_runs(name: str, data: str) -> list[dict]:
    """A row's runs with all seeds."""
    value, _ = tuned_value(name)
    return [run_row(name, data, value, seed) for seed in SEEDS]


def measured(name: str, what: str) -> int | None:
    """The median of a row's runs on SST-5 that have it, or None."""
    values = [run[what] for run in final_runs(name, SST) if what in run]
    return median_low(values) if values else None


def run_baseline(data: str, shots: int | None = None, seed: int = 0) -> dict:
    """What `baseline` returns."""
    identity = {"name": BASELINE, "data": Path(data).name, "shots": shots, "seed": seed}
    return record(identity, lambda: baseline(data, shots, seed))


def run_rows(names: list[str]) -> None:
    """Run what is missing on SST-5."""
    for name in names:
        value, found = tuned_value(name)
        print(f"{name}: {spread(final_runs(name, SST), 'dev')} with {value} of {found}", flush=True)


def best_methods() -> list[str]:
    """Those with the highest mean on SST-5's dev."""
    means = {name: mean(accuracies(final_runs(name, SST), "dev") or [0]) for name in METHODS}
    return sorted(means, key=means.get, reverse=True)[:N_BEST]


def write_timed_part(folder: str) -> str:
    """Copy every `TIMED_STRIDE`-th line of SST-5's files, so that they are about as long as all.

    Returns:
        path up to `-train.txt`.
    """
    data = str(Path(folder, "sst"))
    for split, n_lines in TIMED_LINES.items():
        with open(f"{SST}-{split}.txt") as all_lines, open(f"{data}-{split}.txt", "w") as part:
            part.writelines(itertools.islice(all_lines, 0, n_lines * TIMED_STRIDE, TIMED_STRIDE))
    shutil.copy(f"{SST}-label-mapping.json", f"{data}-label-mapping.json")
    return data


def timed_round(number: int) -> dict:
    """Time an epoch on a part of SST-5 by row, one after the other, and a step of pre-training.

    Returns:
        `seconds` by row, None if it diverged, and of "step"; `n_train`, the sentences of SST-5.
    """
    tuned = {name: tuned_value(name)[0] for name in REFERENCE | METHODS}

    def measure() -> dict:
        seconds = {}
        with tempfile.TemporaryDirectory() as folder:
            data = write_timed_part(folder)
            for name, value in tuned.items():
                run = classify(data, ROWS[name].settings(SST, value, number) | {"epochs": 1})
                seconds[name] = run.get("train_seconds")
            pretrain_on_tasks("sentences", TIMED_STEPS, Path(folder, "run"))
            lines = Path(folder, "run/metrics.jsonl").read_text().splitlines()
        total = max(json.loads(line).get("seconds", 0.0) for line in lines)
        n_train = len(read_labelled(f"{SST}-train.txt"))
        return {"seconds": seconds | {"step": total / TIMED_STEPS}, "n_train": n_train}

    return record({"name": "times", "round": number, "tuned": tuned}, measure)


@functools.cache
def times() -> dict[str, float]:
    """Estimate the time of training on SST-5 by row, as a multiple of plain's.

    It is the median of the rounds, in which what a part of the sentences takes is scaled up, and
    continued pre-training is added. Rows that diverged in all rounds are not there.
    """
    ratios: dict[str, list[float]] = {}
    for number in range(N_ROUNDS):
        timed = timed_round(number)
        seconds, totals = timed["seconds"], {}
        for name in REFERENCE | METHODS:
            value, _ = tuned_value(name)
            if seconds[name] is not None:
                epochs = ROWS[name].settings(SST, value, number)["epochs"]
                totals[name] = seconds[name] * epochs * timed["n_train"] / TIMED_LINES["train"]
                totals[name] += pretraining_steps(name, value) * seconds["step"]
        for name, total in totals.items():
            ratios.setdefault(name, []).append(total / totals["plain"])
    return {name: median(values) for name, values in ratios.items()}


def make_table() -> list[list[str]]:
    """The cells, row by row; what is missing runs."""
    on_cfimdb = [*REFERENCE, *best_methods()]
    return [
        *(trained_cells(name, name in on_cfimdb) for name in REFERENCE),
        baseline_cells(BASELINE, [run_baseline(SST)], [run_baseline(CFIMDB)]),
        *(trained_cells(name, name in on_cfimdb) for name in METHODS),
        *(trained_cells(name) for name in FEW_SHOT),
        baseline_cells(
            f"64 sentences a label: {BASELINE}",
            [run_baseline(SST, SHOTS["shots"], seed) for seed in SEEDS],
        ),
        *(prompted_cells(label) for label in PROMPTS),
    ]


def trained_cells(name: str, on_cfimdb: bool = False) -> list[str]:
    """A row of the table: what is fine-tuned."""
    row, runs = ROWS[name], final_runs(name, SST)
    trained, memory = measured(name, "trained_parameters"), measured(name, "peak_memory_bytes")
    best, found = tuned_value(name)
    values = ", ".join(f"**{v}**" if v == best and len(found) > 1 else f"{v}" for v in found)
    return [
        row.label,
        f"`{row.tuned}` {values}",
        spread(runs, "dev"),
        spread(runs, "test"),
        spread(final_runs(name, CFIMDB), "dev") if on_cfimdb else "",
        f"{trained:,}" if trained else "",
        f"{times()[name]:.1f}" if name in times() else "",
        f"{memory / 2**30:.1f}" if memory else "",
    ]


def baseline_cells(label: str, sst: list[dict], cfimdb: list[dict] | None = None) -> list[str]:
    """A row of the table: what a sceptic would use."""
    return [
        label,
        f"`C` {', '.join(map(str, CS))}",
        spread(sst, "dev"),
        spread(sst, "test"),
        spread(cfimdb, "dev") if cfimdb else "",
        f"{median_low(run['trained_parameters'] for run in sst):,}",
        f"{median(run['seconds'] for run in sst):.0f} s",
        "",
    ]


def prompted_cells(label: str) -> list[str]:
    """A row of the table: prompting, which trains nothing."""
    runs = []
    for data in (SST, CFIMDB):
        flags = with_label_words(PROMPTS[label], data)
        identity = {"name": label, "data": Path(data).name, "flags": flags}
        measure = functools.partial(classify, data, flags, option="prompt")
        runs.append(record(identity, measure))
    sst, cfimdb = runs
    parts = (sst["dev"], sst["test"], cfimdb["dev"])
    return [label, "", *(f"{part['accuracy']:.3f}" for part in parts), "0", "", ""]


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    help = "tune and run only rows with this in their name, on SST-5; print no table"
    parser.add_argument("--only", metavar="PART", default="", help=help)
    only = parser.parse_args().only
    names = [name for name in ROWS if only in name]
    if not names:
        parser.error(f"--only {only}: expected a part of one of {', '.join(ROWS)}")
    check_metrics_file(RESULTS / "advanced.jsonl")
    end_on_sigterm()
    if only:
        run_rows(names)
        return
    try:
        from benchmarks.picture import draw  # needs matplotlib; the runs do not
    except ImportError as error:
        raise InputError(f"{error}; benchmarks/requirements.txt has what is needed") from error
    run_rows(names)
    for cells in (HEADER, ["---"] * len(HEADER), *make_table()):
        print(f"| {' | '.join(cells)} |")
    points = {
        ROWS[name].label: (
            measured(name, "trained_parameters"),
            accuracies(final_runs(name, SST), "dev"),
        )
        for name in REFERENCE | METHODS
    }
    draw(points, (BASELINE, run_baseline(SST)["dev"]["accuracy"]), RESULTS / "advanced.svg")


if __name__ == "__main__":
    run_script(main)
