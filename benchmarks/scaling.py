"""How fast two processes train that share a step, against one process with two threads.

    .venv/bin/python -m benchmarks.scaling --shape demo --rounds 3

All ways take the same steps of 16,384 tokens (`--grad_accum` 4), in turns: one process with as
many threads as there are processes otherwise; processes of one thread that hold copies of the model
(DDP); and such that hold parts of it (--shard). A fourth way is that of copies which add up
nothing: what a step of DDP takes longer is the time that it waits. The bytes are those that
`training.plan` counts.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import torch
from torch import nn
from training.plan import PlanSettings, make_plan

from config import LlamaConfig
from llama import Llama
from minllama.common.program import ArgumentParser, run_script
from minllama.evaluation.language_model import NextTokenScores
from minllama.kernels.cpu import accelerate, keep_freed_memory
from minllama.training import distributed
from minllama.training.precision import mixed_precision, update
from optimizer import AdamW

SHAPES = {
    "demo": {"dim": 256, "n_layers": 6, "n_heads": 4, "n_kv_heads": 4, "vocab_size": 2048},
    "42m": {"dim": 512, "n_layers": 8, "n_heads": 8, "n_kv_heads": 8, "vocab_size": 32000},
}
CONTEXT, ROWS, GRAD_ACCUM = 256, 16, 4  # 16,384 tokens
WAYS = {  # processes in units of --processes, threads in the same, how they share
    "one process": (False, "alone"),
    "DDP": (True, "copies"),
    "--shard": (True, "parts"),
    "adding up nothing": (True, "apart"),
}


def train(shape: str, how: str, steps: int) -> float:
    """Median seconds of a step, after one that is not counted."""
    torch.manual_seed(0)
    llama = Llama(LlamaConfig(causal=True, max_seq_len=CONTEXT, **SHAPES[shape]))
    accelerate(llama)
    if how == "parts":
        distributed.shard(llama, llama.layers, "float32")
    optimizer = AdamW(llama.parameters(), weight_decay=0.1)
    model = distributed.data_parallel(llama, all_used=True)
    batches = torch.randint(SHAPES[shape]["vocab_size"], (GRAD_ACCUM, ROWS, CONTEXT + 1))

    seconds = []
    for step in range(steps + 1):
        start = time.perf_counter()
        losses = losses_of_step(model, batches, add_up=how != "apart")
        update(llama, losses, optimizer, f"step {step}", max_norm=1.0)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def losses_of_step(
    model: nn.Module, batches: torch.Tensor, dtype: str = "float32", add_up: bool = True
) -> Iterator[torch.Tensor]:
    """The losses of a step, as `--option pretrain` computes them.

    Args:
        model: a Llama, or what adds up its gradients.
        batches: ids `(grad_accum, batch, seqlen + 1)`, the same in all processes.
        add_up: whether gradients are added up at all.
    """
    n_targets = torch.tensor(batches[0, :, 1:].numel(), device=batches.device)
    for i, batch in enumerate(batches, start=1):
        distributed.add_up_now(model, add_up and i == len(batches))
        (rows,), _ = distributed.share(batch)
        with mixed_precision(batches.device, dtype):
            logits, _ = model(rows[:, :-1], rows[:, 1:])
        scores = NextTokenScores(logits, rows[:, 1:], bos_id=-1, n_targets=n_targets)
        yield scores.loss / len(batches)


def measure(shape: str, way: str, n: int, steps: int) -> float:
    """Seconds of a step, in processes of their own."""
    several, how = WAYS[way]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(n if several else 1):
        environment = {"OMP_NUM_THREADS": "1" if several else str(n)}
        if several:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-m", "benchmarks.scaling", "--shape", shape]
        command += ["--steps", str(steps), "--how", how]
        processes.append(
            subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE)
        )
    printed = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        sys.exit(f"error: {way} ended early")
    return json.loads(printed[0].splitlines()[-1])


def sent(shape: str, n: int, shard: bool) -> str:
    settings = PlanSettings(
        gpus=n, context=CONTEXT, batch_size=ROWS, grad_accum=GRAD_ACCUM, shard=shard, device="cpu",
        **{name: value for name, value in SHAPES[shape].items()},
    )  # fmt: skip
    return f"{make_plan(settings).in_machine / 2**20:,.0f} MiB"


def main() -> None:
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="demo")
    parser.add_argument("--processes", type=int, default=2, metavar="N")
    parser.add_argument("--steps", type=int, default=3, metavar="N")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--how", choices=[how for _, how in WAYS.values()], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.how:
        keep_freed_memory()
        with distributed.joined():
            print(json.dumps(train(args.shape, args.how, args.steps)))
        return
    print(f"{args.shape}: {GRAD_ACCUM} batches of {ROWS} rows of {CONTEXT} tokens a step")
    for round in range(1, args.rounds + 1):
        seconds = {way: measure(args.shape, way, args.processes, args.steps) for way in WAYS}
        speeds = {way: seconds["one process"] / s for way, s in seconds.items()}
        waits = 1 - seconds["adding up nothing"] / seconds["DDP"]
        print(
            f"round {round}: {', '.join(f'{way} {s:.2f} s' for way, s in seconds.items())}; times "
            f"the speed of one process: DDP {speeds['DDP']:.2f}, --shard {speeds['--shard']:.2f}; "
            f"DDP waits {waits:.0%} of a step",
            flush=True,
        )
    for way, shard in (("DDP", False), ("--shard", True)):
        print(f"{way}: each process sends {sent(args.shape, args.processes, shard)} in a step")


if __name__ == "__main__":
    run_script(main)
