"""Bad inputs and kills by the thousand, the long version of the tests.

    .venv/bin/python -m tests.campaign --minutes 60

Works on a tiny model in temporary folders, on Linux, two at once. Inputs: random flags, damaged
data, checkpoints, saved classifiers, tokenizers and run folders. Each goes to a fork, which
has to end with exit code 0, or with 2 and one line on standard error, within 20 seconds, with at
most twice the memory of a valid input, and without losing a file. Kills: training runs, in one
process and in two, are killed at a random operation on files or a random moment, once or more
often, and then have to end with the weights of an undisturbed run. Prints a table, and every
failure with its seed.
"""

import argparse
import collections
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

# isort: split
import torch

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
from tests.kills import (
    MAX_SECONDS,
    RUNS,
    Outcome,
    fork,
    kill_and_resume,
    new_folder,
    result,
    train,
    wait_for,
)

Counts = collections.Counter[tuple[str, str]]  # by kind and column of the table


# Bad inputs


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
    outcomes = [wait_for(*fork(flags)) for flags in (FINETUNE, PRETRAIN, GENERATE, PROMPT)]
    before = folder.parent / "before"
    shutil.copytree(folder, before)
    outcomes += [wait_for(*fork(flags)) for flags in (FINETUNE, PRETRAIN, LOAD)]
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
        outcome = wait_for(*fork(flags))
        problem = problem_of(outcome, max_bytes) or lost_files(inputs)
        counts[kind, "tried"] += 1
        counts[kind, "refused" if outcome.code == 2 else "ran"] += 1
        if problem:
            counts[kind, "failed"] += 1
            print(f"seed {seed}, {kind}: {' '.join(flags)!r}: {problem}", flush=True)
    return counts


# Kills


def try_kills(folder: Path, until: float, seed: int) -> Counts:
    """Kill and resume training runs until a time, by turns."""
    os.chdir(folder)
    prepare()
    files = {path.name: path.read_bytes() for path in Path().iterdir()}
    undisturbed = {}
    for name in RUNS:
        new_folder(files)
        start = time.monotonic()
        n_operations = int(train(name, n=0).errors.splitlines()[-1])
        undisturbed[name] = (result(), n_operations, time.monotonic() - start)
    counts: Counts = collections.Counter()
    names = itertools.cycle(RUNS)
    while time.monotonic() < until:
        name, seed = next(names), seed + 1
        new_folder(files)
        n_kills, problem = kill_and_resume(name, *undisturbed[name], random.Random(seed))
        counts[name, "tried"] += 1
        counts[name, "kills"] += n_kills
        if problem:
            counts[name, "failed"] += 1
            print(f"seed {seed}, kills of {name}: {problem}", flush=True)
    return counts


def run_in_folders(
    do: Callable[[Path, float, int], Counts], until: float, seed: int, columns: tuple[str, ...]
) -> bool:
    """Run a part of the campaign in two processes and their folders, and print its table.

    Returns:
        whether anything failed.
    """
    with tempfile.TemporaryDirectory() as parent, multiprocessing.Pool(2) as pool:
        folders = [Path(parent) / f"worker{i}" / "work" for i in range(2)]
        for path in folders:
            path.mkdir(parents=True)
        seeds = [1_000_000 * (2 * seed + i) for i in range(2)]
        counts = sum(
            pool.starmap(do, zip(folders, [until] * 2, seeds, strict=True)),
            start=collections.Counter(),
        )
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
        has_failed |= run_in_folders(try_bad_inputs, middle, args.seed, ("ran", "refused"))
    if args.kills_share > 0:
        has_failed |= run_in_folders(try_kills, end, args.seed, ("kills",))
    sys.exit(has_failed)


if __name__ == "__main__":
    main()
