"""Commands that take turns, each in a process of its own, and the table of their medians.

The ways of fine-tuning and prompting that are compared are such commands too.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import harmonic_mean, median

from experiments.runs import ROOT, arguments, data_flags, run_command, run_llama, write_sample
from minllama.common.program import ArgumentParser, positive, script_parser
from minllama.common.progress import progress_bar

Measure = Callable[[], dict[str, float]]  # measures some quantities once
Results = dict[str, dict[str, list[float]]]  # by contender and quantity, one value per round
REFERENCE = "the reference's way"
WAYS: dict[str, dict[str, object]] = {  # by name their flags
    "unmasked float32": {"no-causal": True},
    "causal float32": {"causal": True},
    "causal bfloat16": {"causal": True, "dtype": "bfloat16"},
}


def make_parser(description: str | None) -> ArgumentParser:
    """A parser with the flags that these benchmarks share."""
    parser = script_parser(description)
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--threads", type=positive, default=2, help="of one process")
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


def make_ways_parser(description: str | None, batch_size: int) -> ArgumentParser:
    """A parser with the flags of the model and the data."""
    parser = make_parser(description)
    parser.add_argument("--pretrained-model-path", required=True)
    parser.add_argument("--tokenizer-path", default="tokenizer.model")
    parser.add_argument("--data", default="data/sst", help="path up to -train.txt")
    parser.add_argument("--batch_size", type=positive, default=batch_size)
    return parser


def race(
    flags: argparse.Namespace,
    ways: dict[str, dict[str, object]],
    n_lines: dict[str, int],
    measure: Callable[[list[dict]], dict[str, float]],
    min_words: int = 0,
    **more: object,
) -> None:
    """Let the reference's way and others take turns on a sample of the data, and print the table.

    Args:
        ways: flags of the others, by name.
        n_lines, min_words: the size of the sample, as `write_sample` takes it.
        measure: takes the records of a run's metrics.
        more: flags of all ways.
    """
    shared: dict[str, object] = {"batch_size": flags.batch_size, **more}
    for name in ("pretrained-model-path", "tokenizer-path"):
        shared[name] = os.path.abspath(getattr(flags, name.replace("-", "_")))

    def run_once(command: list[str]) -> dict[str, float]:
        return measure(run(command, flags.threads)[0])

    with tempfile.TemporaryDirectory() as folder:
        shared |= data_flags(write_sample(flags.data, folder, n_lines, min_words))
        reference = [sys.executable, "-m", "benchmarks.reference_way", *arguments(shared)]
        contenders = {REFERENCE: partial(run_once, reference)}
        shared["metrics_out"] = "metrics.jsonl"
        for way, its_flags in ways.items():
            contenders[way] = partial(run_once, run_llama(shared | its_flags))
        print_table(take_turns(contenders, flags.rounds))


def evaluation_rate(records: list[dict]) -> float:
    """Sentences per second of the last two evaluations, those of dev and test."""
    return harmonic_mean([record["sentences_per_second"] for record in records[-2:]])
