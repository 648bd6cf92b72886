"""Runs of the command line, each one a process, their results kept in a file."""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

from tqdm import tqdm

from evaluation import append_metrics

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "data/demo/model.pt"
DIVERGED = {split: {"accuracy": 0.0, "macro_f1": 0.0} for split in ("dev", "test")}


def run_llama(flags: dict[str, object]) -> list[object]:
    """The command `run_llama.py` with flags.

    Args:
        flags: without the dashes; True for those that take no value, a list for those that take
            several.
    """
    command = [sys.executable, ROOT / "run_llama.py"]
    for flag, value in flags.items():
        values = value if isinstance(value, list) else [value]
        command += [f"--{flag}", *(str(v) for v in values if v is not True)]
    return command


def classify(
    results: Path,
    name: str,
    data: str,
    flags: dict[str, object],
    model: Callable[[], Path] = lambda: DEMO,
    option: str = "finetune",
) -> dict:
    """Run `--option finetune` or `prompt`, or look up what it gave before.

    Args:
        results: a file of JSON lines, to which the result is appended; so an interrupted series
            of runs can be started again, and lost is only the run that was under way. What another
            file of that folder has is not run again either.
        name: what the run is known by.
        data: path up to `-train.txt`.
        flags: as `run_llama` takes them; a path of `label-names` is relative to the repository.
        model: returns the checkpoint to start from, and makes it if it is not there.

    Returns:
        `name`, `data`, `flags`; accuracy and macro-averaged F1 of `dev` and `test`, when
        fine-tuning for the epoch that is best on dev; `seconds` and `peak_memory_bytes`; and of
        fine-tuning `train_seconds`, `train_loss` of every epoch and `trained_parameters`. Causal
        runs do not evaluate train, which changes nothing else. With WiSE-FT there is also `alpha`,
        and where the loss was not finite, accuracies of 0 and no more.
    """
    identity = {"name": name, "data": Path(data).name, "flags": flags}
    for record in read_records(results.parent):
        if identity.items() <= record.items():
            return record
    paths = {split: Path(f"{data}-{split}.txt").resolve() for split in ("train", "dev", "test")}
    names = Path(f"{data}-label-mapping.json").resolve()
    paths |= {
        "label-names": ROOT / flags.get("label-names", names),
        "pretrained-model-path": model(),
    }
    unseen = {"skip_train_eval": True} if option == "finetune" and "causal" in flags else {}
    settings = {"option": option, "metrics_out": "metrics.jsonl"} | unseen | flags | paths
    results.parent.mkdir(parents=True, exist_ok=True)
    tqdm.write(f"{name}: {flags}")
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(run_llama(settings), cwd=folder, capture_output=True, text=True)
        if done.returncode == 2 and "lower --lr" in done.stderr:
            append_metrics(results, **identity, **DIVERGED)
            return identity | DIVERGED
        if done.returncode != 0:
            raise RuntimeError(f"{name}: {flags}: {done.stderr}")
        lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    *epochs, dev, test = map(json.loads, lines)
    measured = epochs or [dev, test]
    record = identity | {
        "dev": {"accuracy": dev["accuracy"], "macro_f1": dev["macro_f1"]},
        "test": {"accuracy": test["accuracy"], "macro_f1": test["macro_f1"]},
        "seconds": sum(part["seconds"] for part in measured),
        "peak_memory_bytes": max(part["peak_memory_bytes"] for part in measured),
    }
    if epochs:
        record["train_seconds"] = sum(epoch["train_seconds"] for epoch in epochs)
        record["train_loss"] = [epoch["train_loss"] for epoch in epochs]
        record["trained_parameters"] = epochs[0]["trained_parameters"]
    if kept := re.search("keep alpha (.*)", done.stdout):
        record["alpha"] = float(kept[1])
    append_metrics(results, **record)
    return record


def read_records(folder: Path) -> list[dict]:
    """All results in a folder."""
    files = sorted(folder.glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def spread(records: list[dict], split: str) -> str:
    """Mean and deviation (of the sample) of the accuracies, as text."""
    accuracies = [record[split]["accuracy"] for record in records]
    return f"{mean(accuracies):.3f} ± {stdev(accuracies):.3f}"
