"""The ways of fine-tuning and prompting that are compared, each a run of the command line."""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from statistics import harmonic_mean

from benchmarks.compare import make_parser, print_table, run, take_turns
from experiments.runs import arguments, data_flags, run_llama, write_sample
from minllama.common.program import ArgumentParser

REFERENCE = "the reference's way"
WAYS: dict[str, dict[str, object]] = {  # by name their flags
    "unmasked float32": {"no-causal": True},
    "causal float32": {"causal": True},
    "causal bfloat16": {"causal": True, "dtype": "bfloat16"},
}


def make_ways_parser(description: str | None, batch_size: int) -> ArgumentParser:
    """A parser with the flags of the model and the data."""
    parser = make_parser(description)
    parser.add_argument("--pretrained-model-path", required=True)
    parser.add_argument("--tokenizer-path", default="tokenizer.model")
    parser.add_argument("--data", default="data/sst", help="path up to -train.txt")
    parser.add_argument("--batch_size", type=int, default=batch_size)
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
        n_lines, min_words: of the sample, as `write_sample` takes them.
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
