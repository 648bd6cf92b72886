"""Fine-tuning runs of the command line, each one a process, their results kept in a file."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, stdev

from tqdm import tqdm

ROOT = Path(__file__).parent.parent


def fine_tune(
    results: Path,
    name: str,
    data: str,
    flags: dict[str, object],
    model: str = "data/demo/model.pt",
) -> dict:
    """Run `run_llama.py --option finetune`, or look up what it gave before.

    Args:
        results: a file of JSON lines, to which the result is appended; so an interrupted series
            of runs can be started again, and lost is only the run that was under way.
        name: what the tables call the run.
        data: path up to `-train.txt`.
        flags: of the command line, without the dashes; True for those that take no value, a list
            for those that take several.
        model: the checkpoint to start from.

    Returns:
        `name`, `data`, `flags`, accuracies and macro-averaged F1 of `dev` and `test` for the epoch
        that is best on dev, `train_loss` of every epoch, `seconds` of the training,
        `peak_memory_bytes`, `trained_parameters`.
    """
    identity = {"name": name, "data": Path(data).name, "flags": flags}
    if results.exists():
        for record in map(json.loads, results.read_text().splitlines()):
            if identity.items() <= record.items():
                return record
    command = [sys.executable, ROOT / "run_llama.py", "--option", "finetune"]
    command += ["--pretrained-model-path", ROOT / model, "--metrics_out", "metrics.jsonl"]
    for split in ("train", "dev", "test"):
        command += [f"--{split}", Path(f"{data}-{split}.txt").resolve()]
    command += ["--label-names", Path(f"{data}-label-mapping.json").resolve()]
    for flag, value in flags.items():
        values = value if isinstance(value, list) else [value]
        command += [f"--{flag}", *(str(v) for v in values if v is not True)]
    results.parent.mkdir(parents=True, exist_ok=True)
    tqdm.write(f"{name}: {flags}")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, check=True)
        lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    *epochs, dev, test = map(json.loads, lines)
    record = identity | {
        "dev": {"accuracy": dev["accuracy"], "macro_f1": dev["macro_f1"]},
        "test": {"accuracy": test["accuracy"], "macro_f1": test["macro_f1"]},
        "train_loss": [epoch["train_loss"] for epoch in epochs],
        "seconds": sum(epoch["seconds"] for epoch in epochs),
        "peak_memory_bytes": max(epoch["peak_memory_bytes"] for epoch in epochs),
        "trained_parameters": epochs[0]["trained_parameters"],
    }
    with results.open("a") as file:
        file.write(f"{json.dumps(record)}\n")
    return record


def spread(records: list[dict], split: str) -> str:
    """Mean and deviation (of the sample) of the accuracies, as text."""
    accuracies = [record[split]["accuracy"] for record in records]
    return f"{mean(accuracies):.3f} ± {stdev(accuracies):.3f}"
