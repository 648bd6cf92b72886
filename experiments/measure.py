"""The runs of the report. Those recorded in `results/methods.jsonl` do not run again."""

import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median, median_low
from typing import Any

from experiments.baseline import baseline
from experiments.corpus import read_documents
from experiments.rows import METHODS, REFERENCE, ROWS
from experiments.runs import DEMO, RESULTS, accuracies, classify, recorded, run_llama, write_sample
from experiments.task_text import SST, task_text
from minllama.common.errors import InputError
from minllama.common.files import atomic_write, file_fingerprint
from minllama.text.labelled import read_labelled

RECORDS = RESULTS / "methods.jsonl"
TUNING_SEED = 1337
N_ROUNDS = 3
TIMED_LINES = {"train": 1500, "dev": 100, "test": 100}
TIMED_STEPS = 20  # of pre-training


def record(identity: dict, measure: Callable[[], dict]) -> dict:
    """`recorded` for this demo model. Remove the lines where the domain-adapted models change."""
    return recorded(RECORDS, identity | {"demo": demo_fingerprint()}, measure)


@functools.cache
def demo_fingerprint() -> str:
    return file_fingerprint(DEMO)


def review_text(reviews_mb: int) -> Path:
    """The text of so many megabytes of reviews.

    Raises:
        InputError: it does not exist.
    """
    path = RESULTS / f"reader-{reviews_mb}.txt"
    if not path.is_file():
        raise InputError(
            f"{path}: not there; `python -m experiments.reviews ARCHIVE … --megabytes {reviews_mb} "
            f"--out {path}` writes it (see docs/pretraining.md)"
        )
    return path


@functools.cache
def adapted_model(reviews_mb: int) -> Path:
    """The demo model after pre-training on so many megabytes of reviews, made if need be."""
    if reviews_mb == 0:
        return DEMO
    steps = reviews_mb * 100 // 3
    return pretrain_further(
        DEMO,
        review_text(reviews_mb),
        RESULTS / f"reader-{reviews_mb}",
        split=[0.996, 0.004, 0],
        steps=steps,
        warmup_steps=min(100, steps // 10),
        eval_every=100,
        eval_batches=10,
    )


@functools.cache
def pretrain_on_tasks(corpus: str, steps: int, reviews_mb: int, folder: Path | None = None) -> Path:
    """Continue pre-training on the training sentences of both tasks; returns the checkpoint.

    Args:
        corpus: "sentences", or "labelled" where they end in their labels.
        reviews_mb: megabytes of reviews that the `adapted_model` to start from has read.
        folder: the folder of the run; None takes one in `RESULTS`.
    """
    name = f"{corpus}-{steps}" + (f"-reader-{reviews_mb}" if reviews_mb else "")
    folder = folder or RESULTS / name
    text = folder.with_suffix(".txt")
    with atomic_write(text) as file:
        file.writelines(task_text(corpus == "labelled"))
    return pretrain_further(
        adapted_model(reviews_mb),
        text,
        folder,
        split=[0.9, 0.05, 0.05],
        max_seq_len=256,
        batch_size=32,
        steps=steps,
        dropout=0.1,
        attention_dropout=0,
    )


def pretrain_further(model: Path, text: Path, folder: Path, **flags: object) -> Path:
    """Run or resume `--option pretrain` from a model, and return the checkpoint.

    Raises:
        InputError: the folder holds another run, or is in use.
    """
    paths = {"pretrained-model-path": model, "text": text, "output_dir": folder}
    flags = {"option": "pretrain", "dtype": "bfloat16"} | paths | flags
    print(f"pre-training: {folder}", file=sys.stderr, flush=True)
    done = subprocess.run(run_llama(flags), stdout=subprocess.DEVNULL)
    if done.returncode == 2:
        raise InputError(f"{folder}: not pre-trained; see above")
    done.check_returncode()
    return folder / "model.pt"


def pretraining_steps(name: str, value: Any) -> int:
    """Steps of `pretrain_on_tasks` before a row's run with a value of its hyperparameter."""
    row = ROWS[name]
    if row.corpus is None:
        return 0
    return value if row.steps_of is None else tuned_value(row.steps_of)


def run_row(name: str, data: str, value: object, seed: int | None) -> dict:
    """One run of a row; returns what `classify` or `baseline` does."""
    row = ROWS[name]
    flags = row.settings(data, value, seed)
    steps = pretraining_steps(name, value)
    identity = {"name": name, "data": Path(data).name, "flags": flags, "steps": steps}

    def measure() -> dict:
        if row.option == "baseline":
            texts = read_documents(review_text(row.reviews_mb)) if row.reviews_mb else None
            return baseline(data, unlabelled=texts, **flags)
        if row.corpus is not None:
            model = pretrain_on_tasks(row.corpus, steps, row.reviews_mb)
        else:
            model = adapted_model(row.reviews_mb)
        return classify(data, flags, model, row.option)

    return record(identity | {"reviews_mb": row.reviews_mb}, measure)


def tuned_value(name: str) -> Any:
    """A row's only hyperparameter, or the one with the best accuracy on SST-5's dev."""
    row = ROWS[name]
    if row.option == "baseline":  # tunes its own
        return None
    if len(row.values) == 1:
        return row.values[0]
    runs = {value: run_row(name, SST, value, TUNING_SEED) for value in row.values}
    return max(runs, key=lambda value: sum(accuracies([runs[value]], "dev")))


def final_runs(name: str, data: str) -> list[dict]:
    """A row's runs with all seeds."""
    value = tuned_value(name)
    return [run_row(name, data, value, seed) for seed in ROWS[name].seeds]


def measured(name: str, quantity: str) -> int | None:
    """The median over a row's runs on SST-5, or None if all diverged or do not have it."""
    values = [run[quantity] for run in final_runs(name, SST) if quantity in run]
    return median_low(values) if values else None


def timed_round(number: int, values: dict[str, Any]) -> dict:
    """Time an epoch on a sample of SST-5 row by row, and a step of pre-training.

    Args:
        values: the hyperparameter of each row.

    Returns:
        `seconds` by row, None if it diverged, and of "step"; `n_train`, the sentences of SST-5.
    """

    def measure() -> dict:
        seconds = {}
        with tempfile.TemporaryDirectory() as folder:
            data = write_sample(SST, folder, TIMED_LINES)
            for name, value in values.items():
                run = classify(data, ROWS[name].settings(SST, value, number) | {"epochs": 1})
                seconds[name] = run.get("train_seconds")
            pretrain_on_tasks("sentences", TIMED_STEPS, 0, Path(folder, "run"))
            lines = Path(folder, "run/metrics.jsonl").read_text().splitlines()
        seconds["step"] = max(json.loads(line).get("seconds", 0.0) for line in lines) / TIMED_STEPS
        return {"seconds": seconds, "n_train": len(read_labelled(f"{SST}-train.txt"))}

    return record({"name": "times", "round": number, "tuned": values}, measure)


def relative_times() -> dict[str, float]:
    """Median training times on SST-5 relative to plain's, continued pre-training included."""
    values = {name: tuned_value(name) for name in REFERENCE | METHODS}
    ratios: dict[str, list[float]] = {name: [] for name in values}
    for number in range(N_ROUNDS):
        timed = timed_round(number, values)
        seconds, totals = timed["seconds"], {}
        for name, value in values.items():
            if seconds[name] is not None:
                epochs = ROWS[name].settings(SST, value, number)["epochs"]
                totals[name] = seconds[name] * epochs * timed["n_train"] / TIMED_LINES["train"]
                totals[name] += pretraining_steps(name, value) * seconds["step"]
        for name, total in totals.items():
            ratios[name].append(total / totals["plain"])
    return {name: median(of_rounds) for name, of_rounds in ratios.items() if of_rounds}
