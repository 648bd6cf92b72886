"""Decoding with several threads, by the size of the model, on an idle and on a busy machine.

    .venv/bin/python -m benchmarks.threads

Tokens per second of one text at temperature 0, for models with random weights: with one thread and
with one per processor, then the same while another process keeps a processor busy. Threads wait for
each other after every product, and for a busy processor too.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from statistics import median

SHAPES = {  # dim, layers, heads, pieces, dtypes
    "260K": (64, 5, 8, 512, ("float32",)),
    "5M": (256, 6, 4, 2048, ("int8", "float32")),
    "42M": (512, 8, 8, 32000, ("int8", "float32")),
}
N_NEW, ROUNDS = 48, 3


def measure() -> None:
    """Print the speeds of every shape and precision as JSON, with this process's threads."""
    import torch

    from config import LlamaConfig
    from llama import Llama
    from minllama.inference.decoding import decode
    from minllama.inference.generator import prepared
    from minllama.inference.sampling import Sampling

    speeds = {}
    for name, (dim, n_layers, n_heads, vocab_size, dtypes) in SHAPES.items():
        shape = {"dim": dim, "n_layers": n_layers, "n_heads": n_heads, "n_kv_heads": n_heads}
        for dtype in dtypes:
            torch.manual_seed(0)
            llama = Llama(LlamaConfig(**shape, vocab_size=vocab_size, causal=True)).eval()
            model = prepared(llama, dtype, torch.device("cpu"), compile=False)
            times = []
            for _ in range(ROUNDS):
                start = time.perf_counter()
                n_tokens = len(list(decode(model, [[1]], N_NEW, Sampling(0.0), ())))
                times.append((time.perf_counter() - start) / n_tokens)
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


def keep_busy() -> None:
    """Keep a processor busy until killed."""
    while True:
        pass


def main() -> None:
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    print(f"tokens/s with 1 and {n} threads, and the ratio")
    for state in ("idle", "busy"):
        other = multiprocessing.Process(target=keep_busy, daemon=True)
        if state == "busy":
            other.start()
        one, several = speeds_with(1), speeds_with(n)
        for name, speed in one.items():
            ratio = several[name] / speed
            print(f"{state}  {name:13}{speed:9.1f}{several[name]:9.1f}{ratio:7.2f}", flush=True)
    other.kill()


if __name__ == "__main__":
    if sys.argv[1:] == ["measure"]:
        measure()
    else:
        main()
