"""Decoding with several threads, by the size of the model, on an idle and on a busy machine.

    .venv/bin/python -m benchmarks.threads

Tokens per second of one text at temperature 0, for models with random weights: with one thread and
with one per processor, then the same while another process keeps a processor busy. Threads wait for
each other after every product, and for a busy processor too.
"""

import multiprocessing
import time
from statistics import median

import torch

from config import LlamaConfig
from llama import Llama
from minllama.common.program import run_script, script_parser
from minllama.inference.decoding import decode
from minllama.inference.generator import prepare_for_inference
from minllama.inference.sampling import Sampling
from minllama.kernels.batch1 import Batch1Llama

SHAPES = {  # dim, layers, heads, pieces, dtypes
    "260K": (64, 5, 8, 512, ("float32",)),
    "5M": (256, 6, 4, 2048, ("int8", "float32")),
    "42M": (512, 8, 8, 32000, ("int8", "float32")),
}
N_NEW, ROUNDS = 48, 3


def tokens_per_second(model: Llama | Batch1Llama, n_threads: int) -> float:
    torch.set_num_threads(n_threads)
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        n_tokens = len(list(decode(model, [[1]], N_NEW, Sampling(0.0), ())))
        times.append((time.perf_counter() - start) / n_tokens)
    return 1 / median(times)


def keep_busy() -> None:
    """Keep a processor busy until killed."""
    while True:
        pass


def measure(state: str, n_threads: int) -> None:
    """Print the speeds of all models on an idle or busy machine."""
    for name, (dim, n_layers, n_heads, vocab_size, dtypes) in SHAPES.items():
        config = LlamaConfig(vocab_size, dim, 0.0, n_layers, n_heads, n_heads, causal=True)
        for dtype in dtypes:
            model = prepare_for_inference(
                Llama(config).eval(), dtype, torch.device("cpu"), compile=False
            )
            one, several = (tokens_per_second(model, n) for n in (1, n_threads))
            ratio = several / one
            print(f"{state}  {name:5}{dtype:8}{one:9.1f}{several:9.1f}{ratio:7.2f}", flush=True)


def main() -> None:
    script_parser(__doc__).parse_args()
    n_threads = torch.get_num_threads()
    print(f"tokens/s with 1 and {n_threads} threads, and the ratio")
    measure("idle", n_threads)
    other = multiprocessing.get_context("spawn").Process(target=keep_busy, daemon=True)
    other.start()
    measure("busy", n_threads)
    other.kill()


if __name__ == "__main__":
    run_script(main)
