"""Training runs that are killed and resumed, for the campaign."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from minllama.checkpoints.pt import read_checkpoint
from tests.bad_inputs import FINETUNE, PRETRAIN

ROOT = Path(__file__).parent.parent


class Run(NamedTuple):
    """A training run that is killed."""

    flags: list[str]
    n_processes: int = 1


LONG_FINETUNE = [*FINETUNE[:-1], "3", "--save_every", "2", "--hidden_dropout_prob", "0.2"]
RUNS = {
    "fine-tuning": Run(LONG_FINETUNE),
    "LoRA": Run([*FINETUNE[:-1], "2", "--tune", "lora", "--causal"]),
    "pre-training": Run([*PRETRAIN, "--dropout", "0.1"]),
    "fine-tuning in 2 processes": Run(LONG_FINETUNE, n_processes=2),
}


class Result(NamedTuple):
    """The weights and the names of the files of a run, and how long it took."""

    weights: dict[str, torch.Tensor]
    names: set[str]
    n_operations: int
    seconds: float


def run_killed(folder: Path, run: Run, n: int = 0, seconds: float | None = None) -> str:
    """Run, and kill rank 0 before its n-th operation on files, or all ranks after some seconds.

    Returns:
        the standard error of rank 0.

    Raises:
        AssertionError: a process ended in another way.
    """
    first, *others = start(folder, run, n)
    try:
        _, errors = first.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        first.kill()
        _, errors = first.communicate()
    for process in others:
        if first.returncode != 0:  # torchrun would end the others too
            process.kill()
        process.wait()
    codes = [process.returncode for process in (first, *others)]
    if codes[0] not in (0, -signal.SIGKILL) or (codes[0] == 0 and any(codes)):
        raise AssertionError(f"exit codes {codes}: {errors[-500:]}")
    return errors


def start(folder: Path, run: Run, n: int) -> list[subprocess.Popen]:
    """Start the processes of a run; rank 0 kills itself before its n-th operation on files."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"PYTHONPATH": ROOT, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    for rank in range(run.n_processes):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": run.n_processes}
        command = [sys.executable, "-m", "tests.file_operations", 0 if rank else n]
        command += [ROOT / "run_llama.py", *run.flags]
        process = subprocess.Popen(
            list(map(str, command)),
            cwd=folder,
            env=os.environ | {name: str(value) for name, value in (shared | own).items()},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL if rank else subprocess.PIPE,
            text=True,
        )
        processes.append(process)
    return processes


def new_folder(folder: Path, files: dict[str, bytes]) -> Path:
    """Make a folder anew, with some files in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def result_of(folder: Path, n_operations: int = 0, seconds: float = 0.0) -> Result:
    """The result of a run in a folder."""
    path = next(iter([*folder.glob("finetune-*.pt"), *folder.glob("run/model.pt")]))
    names = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    return Result(read_checkpoint(path)["model"], names, n_operations, seconds)


def kill_and_resume(
    folder: Path, run: Run, expected: Result, n_kills: int, rng: random.Random
) -> str | None:
    """Kill a run several times, then let it end; how it differs from an undisturbed one."""
    try:
        for _ in range(n_kills):
            if rng.random() < 0.7:
                run_killed(folder, run, rng.randint(1, expected.n_operations))
            else:
                run_killed(folder, run, seconds=rng.uniform(0.5, expected.seconds))
        run_killed(folder, run)
    except AssertionError as error:
        return str(error)
    weights, names, *_ = result_of(folder)
    if names != expected.names:
        return f"other files: {names ^ expected.names}"
    is_same = weights.keys() == expected.weights.keys() and all(
        torch.equal(weights[name], tensor) for name, tensor in expected.weights.items()
    )
    return None if is_same else "other weights"
