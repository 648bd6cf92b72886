"""How many threads decoding is worth, by the size of the model, on an idle and on a busy machine.

    .venv/bin/python -m benchmarks.threads

Tokens per second of one row at temperature 0, for models of random weights, with one thread and
with one for each processor; then the same while another process keeps a processor busy. Threads
wait for each other after every product. Where one of them has no processor, all wait for it.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from statistics import median

SHAPES = {  # by name: dim, layers, heads, pieces
    "260K": (64, 5, 8, 512),
    "5M": (256, 6, 4, 2048),
    "15M": (288, 6, 6, 32000),
    "42M": (512, 8, 8, 32000),
    "110M": (768, 12, 12, 32000),
}
DTYPES = ("float32", "int8")
N_NEW, ROUNDS = 48, 3


def measure() -> None:
    """Print the speeds of every shape and precision as JSON, with this process's threads."""
    import torch

    from config import LlamaConfig
    from llama import Llama
    from minllama.inference.decoding import decode
    from minllama.inference.sampling import Sampling
    from minllama.kernels.batch1 import Batch1Llama

    speeds = {}
    for name, (dim, n_layers, n_heads, vocab_size) in SHAPES.items():
        config = LlamaConfig(
            dim=dim,
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=n_heads,
            vocab_size=vocab_size,
            causal=True,
        )
        for dtype in DTYPES:
            torch.manual_seed(0)
            llama = Batch1Llama(Llama(config).eval(), dtype)
            times = []
            for _ in range(ROUNDS):
                start = time.perf_counter()
                n = sum(1 for _ in decode(llama, [[1]], N_NEW, Sampling(0.0), ()))
                times.append((time.perf_counter() - start) / n)
            speeds[f"{name} {dtype}"] = 1 / median(times)
    print(json.dumps(speeds))


def speeds_with(n_threads: int) -> dict[str, float]:
    """The speeds in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.threads", "measure"],
        env=os.environ | {"OMP_NUM_THREADS": str(n_threads)},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout)


def be_busy() -> None:
    """Keep a processor busy until killed."""
    while True:
        pass


def main() -> None:
    n_processors = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    )
    print(f"{n_processors} processors; tokens/s with 1 and {n_processors} threads, and the ratio")
    for state in ("idle", "busy"):
        other = multiprocessing.Process(target=be_busy, daemon=True)
        if state == "busy":
            other.start()
        one, all_ = speeds_with(1), speeds_with(n_processors)
        if state == "busy":
            other.kill()
        for name, speed in one.items():
            ratio = all_[name] / speed
            print(f"{state}  {name:13}{speed:9.1f}{all_[name]:9.1f}{ratio:7.2f}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["measure"]:
        measure()
    else:
        main()
