"""How fast two processes pre-train that share a step, against one process with two threads.

    .venv/bin/python -m benchmarks.scaling --shape 5m
    .venv/bin/python -m benchmarks.scaling --shape 42m

All take the same steps of 16,384 tokens (`--grad_accum` 4), in turns: one process with --threads
threads, and as many processes of one thread that `torchrun` starts, each with a replica of the
model or a shard of it (--shard). The table has tokens per second, and in brackets the ratio to one
process. `benchmarks.training_memory` computes the bytes that they send.
"""

import argparse
import sys
from functools import partial
from statistics import median

from benchmarks.compare import make_parser, print_table, run, take_turns
from experiments.runs import ROOT, run_llama
from minllama.common.program import positive, run_script

SHAPES: dict[str, dict[str, object]] = {
    "5m": {},
    "42m": {"dim": 512, "n_layers": 8, "n_heads": 8, "tokenizer-path": ROOT / "tokenizer.model"},
}
TRAINING = {
    "option": "pretrain",
    "text": ROOT / "data/demo/reviews-train.txt",
    "split": [0.98, 0.02, 0],
    "max_seq_len": 256,
    "batch_size": 16,
    "grad_accum": 4,
    "eval_batches": 1,
}
N_REPORTS = 3  # that count, after the first one


def measure(flags: argparse.Namespace, n: int, **more: bool) -> dict[str, float]:
    """Tokens per second of `n` processes: the median of the reports after the first."""
    settings = TRAINING | SHAPES[flags.shape] | more
    settings |= {"steps": (1 + N_REPORTS) * flags.steps, "eval_every": flags.steps}
    command = run_llama(settings)
    if n > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)]
        command = [sys.executable, *torchrun, *command[1:]]
    reports, _ = run(command, 1 if n > 1 else flags.threads)
    return {"tokens/s": median(report["tokens_per_second"] for report in reports[1:])}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="5m")
    parser.add_argument("--steps", type=positive, default=3, help="of each report")
    flags = parser.parse_args()
    contenders = {
        "one process": partial(measure, flags, 1),
        "replicas": partial(measure, flags, flags.threads),
        "--shard": partial(measure, flags, flags.threads, shard=True),
    }
    print_table(take_turns(contenders, flags.rounds))


if __name__ == "__main__":
    run_script(main)
