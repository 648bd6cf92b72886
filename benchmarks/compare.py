"""Commands that take turns, each in a process of its own, and the table of their medians."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

from experiments.runs import ROOT, run_command
from minllama.common.program import ArgumentParser, script_parser
from minllama.common.progress import progress_bar

Measure = Callable[[], dict[str, float]]  # measures some quantities once
Results = dict[str, dict[str, list[float]]]  # by contender and quantity, one value per round


def make_parser(description: str | None) -> ArgumentParser:
    """A parser with the flags that these benchmarks share."""
    parser = script_parser(description)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of one process")
    return parser


def run(command: list[str], threads: int) -> tuple[list[dict], str]:
    """Run a command in an empty folder.

    Returns:
        the records of its `metrics.jsonl`, if it wrote one, and its standard error.
    """
    paths = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    environment = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.TemporaryDirectory() as folder:
        done = run_command(command, cwd=folder, env=os.environ | environment)
        files = list(Path(folder).rglob("metrics.jsonl"))
        lines = files[0].read_text().splitlines() if files else []
    return [json.loads(line) for line in lines], done.stderr


def take_turns(contenders: Mapping[str, Measure], rounds: int) -> Results:
    """Measure every contender once a round, in alternating order, after one run to warm up."""
    results: Results = {name: {} for name in contenders}
    names = list(contenders)
    contenders[names[0]]()
    for number in range(rounds):
        for name in progress_bar(names, desc=f"round {number + 1} of {rounds}", unit=" runs"):
            for quantity, value in contenders[name]().items():
                results[name].setdefault(quantity, []).append(value)
        names.reverse()
    return results


def print_table(results: Results) -> None:
    """Print medians, and in brackets the median ratio to the first contender, round by round."""
    width, first = max(map(len, results)), next(iter(results.values()))
    for name, quantities in results.items():
        cells = []
        for quantity, values in quantities.items():
            ratios = [mine / its for mine, its in zip(values, first[quantity], strict=True)]
            cells.append(f"{quantity} {median(values):.4g} ({median(ratios):.2f})")
        print(f"{name:{width}}  {', '.join(cells)}")
