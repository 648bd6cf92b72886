"""Runs in forks of this process, which start at once; training runs that are killed and resumed."""

import contextlib
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import traceback
from pathlib import Path
from typing import IO, NamedTuple

import sklearn.metrics  # noqa: F401, forks would import it, for seconds
import torch
import torch._dynamo

import run_llama
from minllama.checkpoints.pt import read_checkpoint
from minllama.common.program import run_script
from tests.bad_inputs import FINETUNE, PRETRAIN
from tests.file_operations import killed_before

MAX_SECONDS = 20
LONG_FINETUNE = [*FINETUNE[:-1], "3", "--save_every", "2", "--hidden_dropout_prob", "0.2"]
RUNS = {  # flags, and the number of processes
    "fine-tuning": (LONG_FINETUNE, 1),
    "fine-tuning, LoRA": ([*FINETUNE[:-1], "2", "--tune", "lora", "--causal"], 1),
    "fine-tuning in 2 processes": (LONG_FINETUNE, 2),
    "pre-training": ([*PRETRAIN, "--dropout", "0.1"], 1),
    "pre-training in 2 processes": ([*PRETRAIN, "--dropout", "0.1"], 2),
}


class Outcome(NamedTuple):
    """How a process ended."""

    code: int
    errors: str
    peak_bytes: int


def fork(
    flags: list[str], seconds: float = MAX_SECONDS, n: int = -1, **environment: str
) -> tuple[int, IO[bytes]]:
    """Start the program in a fork, which dies in time, or before its n-th operation on files.

    Returns:
        the fork's number, and the file of its standard error.
    """
    errors = tempfile.TemporaryFile()  # noqa: SIM115, `wait_for` closes it
    pid = os.fork()
    if pid == 0:
        os.environ |= environment
        signal.setitimer(signal.ITIMER_REAL, seconds)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(errors.fileno(), 2)
        code = 1
        try:
            sys.argv = ["run_llama.py", *flags]
            with killed_before(n):
                run_script(run_llama.main)
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stderr.flush()
            os._exit(code)
    return pid, errors


def wait_for(pid: int, errors: IO[bytes]) -> Outcome:
    """Wait until a fork has ended."""
    _, status, usage = os.wait4(pid, 0)
    with errors:
        errors.seek(0)
        text = errors.read().decode(errors="replace")
    return Outcome(os.waitstatus_to_exitcode(status), text, usage.ru_maxrss * 1024)


class Result(NamedTuple):
    """The weights and the names of the files of a run."""

    weights: dict[str, torch.Tensor]
    names: set[str]


def train(name: str, n: int = -1, seconds: float = MAX_SECONDS) -> Outcome:
    """Train in the working folder; rank 0 may be killed, and then the others are too.

    Raises:
        AssertionError: a process ended in another way.
    """
    flags, n_processes = RUNS[name]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(n_processes)}
    others = [fork(flags, RANK=str(rank), **address) for rank in range(1, n_processes)]
    first = wait_for(*fork(flags, seconds, n, RANK="0", **address))
    for pid, _ in others:
        if first.code != 0:  # torchrun would end the others too
            os.kill(pid, signal.SIGKILL)
    codes = [first.code, *(wait_for(*other).code for other in others)]
    is_killed = first.code in (-signal.SIGKILL, -signal.SIGALRM) and (
        n > 0 or seconds < MAX_SECONDS
    )
    if not is_killed and any(codes):
        raise AssertionError(f"exit codes {codes}: {first.errors[-500:]}")
    return first


def new_folder(files: dict[str, bytes]) -> None:
    """Leave only some files in the working folder."""
    for path in Path().iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name, content in files.items():
        Path(name).write_bytes(content)


def result() -> Result:
    """The result of the run in the working folder."""
    path = next(iter([*Path().glob("finetune-*.pt"), *Path().glob("run/model.pt")]))
    return Result(read_checkpoint(path)["model"], set(map(str, Path().rglob("*"))))


def kill_and_resume(
    name: str, expected: Result, n_operations: int, seconds: float, rng: random.Random
) -> tuple[int, str | None]:
    """Kill a run up to three times, then let it end.

    Args:
        n_operations, seconds: of an undisturbed run.

    Returns:
        the number of kills, and how the run differs from an undisturbed one.
    """
    n_kills = 0
    try:
        for _ in range(rng.choice((1, 1, 2, 3))):
            if rng.random() < 0.7:
                outcome = train(name, n=rng.randint(1, n_operations))
            else:
                outcome = train(name, seconds=rng.uniform(0.01, seconds))
            n_kills += outcome.code != 0
        train(name)
    except AssertionError as error:
        return n_kills, str(error)
    weights, names = result()
    if names != expected.names:
        return n_kills, f"other files: {names ^ expected.names}"
    is_same = weights.keys() == expected.weights.keys() and all(
        torch.equal(weights[name], tensor) for name, tensor in expected.weights.items()
    )
    return n_kills, None if is_same else "other weights"
