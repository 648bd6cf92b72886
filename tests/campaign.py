"""Bad inputs and kills by the thousand, the long version of the tests.

    .venv/bin/python -m tests.campaign --minutes 60

Works on a tiny model in a temporary folder, on Linux. Inputs: random flags, damaged data,
checkpoints, saved classifiers, tokenizers and run folders. Each goes to a process of its own, which
has to end with exit code 0, or with 2 and one line on standard error, within 20 seconds, with at
most twice the memory of a valid input, and without losing a file. Kills: training runs, in one
process and in two, are killed at a random operation on files or a random moment, once or more
often, and then have to end with the weights of an undisturbed run. Prints a table, and every
failure with its seed.
"""

import argparse
import collections
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

# isort: split
import torch

import run_llama
from minllama.common.program import run_script
from tests.bad_inputs import (
    FINETUNE,
    GENERATE,
    KINDS,
    LOAD,
    PRETRAIN,
    PROMPT,
    SAVED,
    make_bad_input,
    prepare,
)
from tests.kills import RUNS, kill_and_resume, new_folder, result_of, run_killed

ROOT = Path(__file__).parent.parent
MAX_SECONDS = 20
Counts = collections.Counter[tuple[str, str]]  # by kind and column of the table


# Bad inputs


class Outcome(NamedTuple):
    """How a process ended."""

    code: int
    errors: str
    peak_bytes: int


def run_forked(flags: list[str]) -> Outcome:
    """Run in a fork, which starts faster than a new process; it ends after `MAX_SECONDS`."""
    with tempfile.TemporaryFile() as errors:
        pid = os.fork()
        if pid == 0:
            run_and_exit(flags, errors.fileno())
        _, status, usage = os.wait4(pid, 0)
        errors.seek(0)
        text = errors.read().decode(errors="replace")
    return Outcome(os.waitstatus_to_exitcode(status), text, usage.ru_maxrss * 1024)


def run_and_exit(flags: list[str], stderr: int) -> None:
    """Run the program, and end this process as the program ends."""
    signal.alarm(MAX_SECONDS)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(stderr, 2)
    code = 1
    try:
        sys.argv = ["run_llama.py", *flags]
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


def problem_of(outcome: Outcome, max_bytes: int) -> str | None:
    """The promise that an outcome breaks, or None."""
    code, errors, peak_bytes = outcome
    lines = [line for line in errors.splitlines() if not line.startswith("warning: ")]
    if code == -signal.SIGALRM:
        return f"took over {MAX_SECONDS} s"
    if "Traceback" in errors or code not in (0, 2):
        return f"exit code {code}: {errors[-400:]}"
    if code == 2 and sum(line.startswith("error: ") for line in lines) != 1:
        return f"not one error: {errors[:400]}"
    if max(map(len, lines), default=0) > 2000:
        return f"a line of {max(map(len, lines))} characters"
    if peak_bytes > max_bytes:
        return f"{peak_bytes / 2**20:.0f} MiB, more than {max_bytes / 2**20:.0f}"
    return None


def lost_files(inputs: dict[Path, bytes]) -> str | None:
    """Which promise about files is broken, or None."""
    if any(not path.is_file() or path.read_bytes() != data for path, data in inputs.items()):
        return "changed an input"
    if not Path(SAVED).exists() or not Path("run").exists():
        return "lost weights"
    left = [path.name for path in Path().rglob(".*.tmp")]
    return f"left {left}" if left else None


def try_bad_inputs(folder: Path, until: float, seed: int) -> Counts:
    """Try bad inputs until a time."""
    os.chdir(folder)
    prepare()
    outcomes = [run_forked(flags) for flags in (FINETUNE, PRETRAIN, GENERATE, PROMPT)]
    before = folder.parent / "before"
    shutil.copytree(folder, before)
    outcomes += [run_forked(flags) for flags in (FINETUNE, PRETRAIN, LOAD)]
    assert all(outcome.code == 0 for outcome in outcomes), outcomes
    max_bytes = 2 * max(outcome.peak_bytes for outcome in outcomes)
    inputs = {path: path.read_bytes() for path in map(Path, ("model.pt", "text.txt"))}
    counts: Counts = collections.Counter()
    while time.monotonic() < until:
        seed += 1
        rng = random.Random(seed)
        kind = rng.choice(list(KINDS))
        os.chdir(folder.parent)
        shutil.rmtree(folder)
        shutil.copytree(before, folder)
        os.chdir(folder)
        flags = make_bad_input(kind, rng)
        inputs = {path: path.read_bytes() for path in inputs}
        outcome = run_forked(flags)
        problem = problem_of(outcome, max_bytes) or lost_files(inputs)
        counts[kind, "tried"] += 1
        counts[kind, "refused" if outcome.code == 2 else "ran"] += 1
        if problem:
            counts[kind, "failed"] += 1
            print(f"seed {seed}, {kind}: {' '.join(flags)!r}: {problem}", flush=True)
    return counts


# Kills


def try_kills(folder: Path, until: float, seed: int) -> Counts:
    """Kill and resume training runs until a time."""
    os.chdir(folder)
    prepare()
    files = {path.name: path.read_bytes() for path in Path().iterdir()}
    expected = {}
    for name, run in RUNS.items():
        whole, start = new_folder(folder.parent / "whole", files), time.monotonic()
        errors = run_killed(whole, run)
        n_operations = int(errors.splitlines()[-1])
        expected[name] = result_of(whole, n_operations, time.monotonic() - start)
    counts: Counts = collections.Counter()
    while time.monotonic() < until:
        seed += 1
        rng = random.Random(seed)
        name, n_kills = rng.choice(list(RUNS)), rng.choice((1, 1, 2, 3))
        killed = new_folder(folder.parent / "killed", files)
        problem = kill_and_resume(killed, RUNS[name], expected[name], n_kills, rng)
        counts[name, "tried"] += 1
        counts[name, "kills"] += n_kills
        if problem:
            counts[name, "failed"] += 1
            print(f"seed {seed}, kills of {name}: {problem}", flush=True)
    return counts


def run_in_folder(
    do: Callable[[Path, float, int], Counts], until: float, seed: int, columns: tuple[str, ...]
) -> bool:
    """Run a part of the campaign in a temporary folder, and print its table.

    Returns:
        whether anything failed.
    """
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "work"
        folder.mkdir()
        counts = do(folder, until, 1_000_000 * seed)
        os.chdir(ROOT)
    print(f"| kind | tried | {' | '.join(columns)} | failed |")
    print("| --- |" + " --- |" * (len(columns) + 2))
    for kind in dict.fromkeys(kind for kind, _ in counts):
        cells = [counts[kind, column] for column in ("tried", *columns, "failed")]
        print(f"| {kind} | {' | '.join(map(str, cells))} |")
    print(flush=True)
    return any(count > 0 for (_, column), count in counts.items() if column == "failed")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills_share", type=float, default=0.5, metavar="SHARE")
    args = parser.parse_args()
    import resource  # not on Windows

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    end = time.monotonic() + 60 * args.minutes
    middle = end - 60 * args.minutes * args.kills_share
    has_failed = False
    if args.kills_share < 1:
        has_failed |= run_in_folder(try_bad_inputs, middle, args.seed, ("ran", "refused"))
    if args.kills_share > 0:
        has_failed |= run_in_folder(try_kills, end, args.seed, ("kills",))
    sys.exit(has_failed)


if __name__ == "__main__":
    main()
