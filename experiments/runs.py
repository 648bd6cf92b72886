"""Runs of the command line, each a process, and the file that keeps their results."""

import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from experiments.corpus import evenly
from minllama.common.errors import InputError
from minllama.evaluation.metrics import append_metrics
from minllama.text.labelled import SEPARATOR, read_labelled

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments/results"
DEMO = ROOT / "data/demo/model.pt"


def arguments(flags: Mapping[str, object]) -> list[str]:
    """Flags as a command line has them.

    Args:
        flags: without the dashes; True for those without a value, a list for those with several.
    """
    command = []
    for flag, value in flags.items():
        values = value if isinstance(value, list) else [value]
        command += [f"--{flag}", *(str(v) for v in values if v is not True)]
    return command


def run_llama(flags: Mapping[str, object]) -> list[str]:
    """The command `run_llama.py` with flags as `arguments` takes them."""
    return [sys.executable, str(ROOT / "run_llama.py"), *arguments(flags)]


def run_command(command: list[str], **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run a command and capture its output; `settings` are those of `subprocess.run`.

    Raises:
        InputError: it refused its input.
        RuntimeError: it failed.
    """
    done = subprocess.run(command, capture_output=True, text=True, **settings)
    if done.returncode == 2:
        raise InputError(done.stderr.splitlines()[-1].removeprefix("error: "))
    if done.returncode != 0:
        raise RuntimeError(f"{command} ended with {done.returncode}: {done.stderr}")
    return done


def recorded(results: Path, identity: dict, measure: Callable[[], dict]) -> dict:
    """Look up a measurement in a file of JSON lines; else measure, and append it.

    Returns:
        `identity` and what `measure` returns.
    """
    lines = results.read_text().splitlines() if results.is_file() else []
    for record in map(json.loads, lines):
        if identity.items() <= record.items():
            return record
    print(*identity.values(), file=sys.stderr, flush=True)
    record = identity | measure()
    results.parent.mkdir(parents=True, exist_ok=True)
    append_metrics(results, **record)
    return record


def data_flags(data: str) -> dict[str, object]:
    """The flags that name the files of labelled data; `data` is a path up to `-train.txt`."""
    names = {"train": "train.txt", "dev": "dev.txt", "test": "test.txt"}
    names["label-names"] = "label-mapping.json"
    return {flag: Path(f"{data}-{name}").resolve() for flag, name in names.items()}


def write_sample(data: str, folder: str, n_lines: dict[str, int], min_words: int = 0) -> str:
    """Copy evenly spaced lines of labelled data, and the longest one.

    Args:
        data: path up to `-train.txt`.
        n_lines: number of lines by split.
        min_words: sentences are repeated until they have so many.

    Returns:
        path of the sample up to `-train.txt`.
    """
    sample = f"{folder}/sample"
    shutil.copy(f"{data}-label-mapping.json", f"{sample}-label-mapping.json")
    for split, n in n_lines.items():
        sentences = read_labelled(f"{data}-{split}.txt")
        longest = max(sentences, key=lambda example: len(example.sentence))
        with open(f"{sample}-{split}.txt", "w", encoding="utf-8") as file:
            for sentence, label, _ in [longest, *evenly(sentences, n - 1)]:
                repeats = max(1, math.ceil(min_words / len(sentence.split())))
                file.write(f"{label}{SEPARATOR}{' '.join([sentence] * repeats)}\n")
    return sample


def classify(
    data: str, flags: Mapping[str, object], model: Path = DEMO, option: str = "finetune"
) -> dict:
    """Run `--option finetune` or `prompt`.

    Args:
        data: path up to `-train.txt`.
        flags: flags of the command, as `arguments` takes them; a path of `label-names` is relative
            to the repository.
        model: the checkpoint to start from.

    Returns:
        accuracy and macro-averaged F1 of `dev` and `test`, for fine-tuning those of the best epoch
        on dev, and `peak_memory_bytes`; after training `train_seconds`, the `train_loss` of every
        epoch and `trained_parameters`; with WiSE-FT `alpha`. Where the loss was not finite, the
        only key is `diverged`. Causal runs skip the evaluation of train, which changes nothing.

    Raises:
        InputError: the command refused its input.
    """
    paths = data_flags(data) | {"pretrained-model-path": model}
    if "label-names" in flags:
        paths["label-names"] = ROOT / str(flags["label-names"])
    settings: dict[str, object] = {"option": option, "metrics_out": "metrics.jsonl"}
    if option == "finetune" and "causal" in flags:
        settings["skip_train_eval"] = True
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = run_command(run_llama({**settings, **flags, **paths}), cwd=folder)
        except InputError as error:
            if "lower --lr" in str(error):
                return {"diverged": True}
            raise
        lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    *epochs, dev, test = map(json.loads, lines)
    record: dict[str, Any] = {
        "dev": {"accuracy": dev["accuracy"], "macro_f1": dev["macro_f1"]},
        "test": {"accuracy": test["accuracy"], "macro_f1": test["macro_f1"]},
        "peak_memory_bytes": max(run["peak_memory_bytes"] for run in epochs or (dev, test)),
    }
    if epochs:
        record["train_seconds"] = sum(epoch["train_seconds"] for epoch in epochs)
        record["train_loss"] = [epoch["train_loss"] for epoch in epochs]
        record["trained_parameters"] = epochs[0]["trained_parameters"]
    if kept := re.search("keep alpha (.*)", done.stdout):
        record["alpha"] = float(kept[1])
    return record


def accuracies(records: list[dict], split: str) -> list[float]:
    """The accuracies of the runs that did not diverge."""
    return [record[split]["accuracy"] for record in records if "diverged" not in record]


def describe(records: list[dict], split: str) -> str:
    """Mean and sample deviation of the accuracies, and how many runs diverged."""
    values = accuracies(records, split)
    parts = [f"{mean(values):.3f}"] if values else []
    if len(values) > 1:
        parts.append(f"± {stdev(values):.3f}")
    if len(values) < len(records):
        parts.append(f"({len(records) - len(values)} diverged)")
    return " ".join(parts)
