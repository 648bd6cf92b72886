"""llama2.c's programs, built here, in turns with our decoding; for `benchmarks.decode --llama2c`.

`run.c` and `runq.c` are at https://github.com/karpathy/llama2.c. They are compiled as its README
says for speed: `gcc -Ofast -fopenmp -march=native`.
"""

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from benchmarks.decode import load_packed
from llama import load_pretrained
from minllama.checkpoints import llama2c
from minllama.checkpoints.formats import load
from minllama.inference.decoding import decode
from minllama.inference.sampling import Sampling
from minllama.kernels.compiled import CompiledLlama
from minllama.kernels.quantize import DTYPES
from tokenizer import Tokenizer

PROMPT = [1]
PROGRAMS = {"run": 1, "runq": 2}  # and the version of its files


def build(sources: str, folder: Path) -> None:
    """Compile the programs of a folder of sources into another folder."""
    for name in PROGRAMS:
        command = ["gcc", "-Ofast", "-fopenmp", "-march=native", f"{sources}/{name}.c", "-lm"]
        subprocess.run([*command, "-o", folder / name], check=True)


def run_program(folder: Path, name: str, n_new: int, n_threads: int) -> float:
    """Tokens per second, as the program tells them."""
    version = 0 if name == "run" else 2
    command = [folder / name, folder / f"v{version}.bin", "-z", folder / "tokenizer.bin"]
    done = subprocess.run(
        [*command, "-t", "0", "-n", str(n_new)],
        env=os.environ | {"OMP_NUM_THREADS": str(n_threads)},
        capture_output=True,
        check=True,
    )
    return float(re.search(rb"achieved tok/s: ([\d.]+)", done.stderr)[1])


def run_ours(llama: torch.nn.Module, n_new: int) -> float:
    """Tokens per second behind the first, as the programs count."""
    steps = decode(llama, [PROMPT], n_new, Sampling(0.0), ())
    next(steps)
    start = time.perf_counter()
    n = sum(1 for _ in steps)
    return n / (time.perf_counter() - start)


def make_contenders(path: str, folder: Path, n_threads: int) -> dict[str, Callable[[int], float]]:
    """By name what gives tokens per second for a number of tokens."""

    def plain() -> torch.nn.Module:
        return load_pretrained(path, causal=True, init_weights=False).eval()

    contenders: dict[str, Callable[[int], float]] = {}
    for name in PROGRAMS:
        contenders[name] = lambda n, name=name: run_program(folder, name, n, n_threads)
    for dtype in DTYPES:
        eager = load_packed(path, dtype)
        compiled = CompiledLlama(plain(), dtype)
        contenders[f"eager {dtype}"] = lambda n, llama=eager: run_ours(llama, n)
        contenders[f"compiled {dtype}"] = lambda n, llama=compiled: run_ours(llama, n)
    return contenders


def race(sources: str, path: str, tokenizer: str, n_new: int, rounds: int) -> None:
    """Print the speed of each in each round, and how it compares with `run` and `runq`."""
    n_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(sources, folder)
        checkpoint = load(path)
        checkpoint.config.causal = True
        for version in (0, 2):
            llama2c.save(checkpoint, folder / f"v{version}.bin", version)
        (folder / "tokenizer.bin").write_bytes(Tokenizer(tokenizer_model=tokenizer).exported())
        contenders = make_contenders(path, folder, n_threads)
        for contender in contenders.values():  # warm-up
            contender(16)
        speeds: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(rounds):
            for name, contender in contenders.items():
                speeds[name].append(contender(n_new))
    print(f"{n_threads} threads, {n_new} tokens, {rounds} rounds; tokens/s, and ratios by round")
    for name, values in speeds.items():
        ratios = {
            peer: [ours / theirs for ours, theirs in zip(values, speeds[peer], strict=True)]
            for peer in PROGRAMS
        }
        told = "   ".join(
            f"to {peer} {median(all_):.2f} ({', '.join(f'{ratio:.2f}' for ratio in all_)})"
            for peer, all_ in ratios.items()
        )
        print(f"{name:18}{median(values):8.1f}   {told}")
