"""Memory and speed of large models on a small machine, with random weights of their true shapes.

    .venv/bin/python -m pip install -r requirements-extra.txt
    .venv/bin/python -m benchmarks.large FOLDER --shape 1.1b --dtype bfloat16 int8
    .venv/bin/python -m benchmarks.large FOLDER --shape 7b --dtype int8

A folder of Hugging Face's layout in bfloat16 is written to FOLDER, unless it exists: 2.2 GB for
TinyLlama's 1.1B, 13.5 GB for Llama 2's 7B. Then `run_llama.py --causal` generates from it. Its
memory is read every 20 ms: the anonymous part, and the mapped pages of files, which the system can
drop. The memory limit of the speed is the rate at which memory is summed over the bytes that a
token reads. The first token is timed from the start of another process. Linux only.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.make_checkpoint import random_checkpoint
from benchmarks.startup import seconds_to_first_token
from benchmarks.training_memory import SHAPES
from experiments.runs import ROOT, run_llama
from minllama.checkpoints import hf
from minllama.common.program import positive, run_script, script_parser
from minllama.kernels.quantize import BYTES


def peak_memory(command: list[str], folder: str) -> tuple[dict[str, int], str]:
    """Run a command; returns its largest anonymous and mapped memory in bytes, and its output."""
    peaks = {"RssAnon": 0, "RssFile": 0}
    log = Path(folder, "log")
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=folder, stdout=file, stderr=subprocess.STDOUT)
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            for name, before in peaks.items():
                if found := re.search(rf"{name}:\s+(\d+) kB", status):  # not of a zombie
                    peaks[name] = max(before, int(found[1]) * 1024)
            time.sleep(0.02)
    if process.returncode != 0:
        sys.exit(f"{log.read_text()}\nthe command failed")
    return peaks, log.read_text()


def memory_rate() -> float:
    """Bytes per second at which a tensor of 1 GiB is summed, at best."""
    gibibyte, best = torch.ones(2**28), 0.0
    for _ in range(5):
        start = time.perf_counter()
        gibibyte.sum()
        best = max(best, 2**30 / (time.perf_counter() - start))
    return best


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("folder", type=Path, help="for the models")
    parser.add_argument("--shape", choices=("1.1b", "7b"), default="1.1b")
    parser.add_argument("--dtype", nargs="+", choices=BYTES, default=["bfloat16", "int8"])
    parser.add_argument("--tokens", type=positive, default=32, help="to generate, at temperature 0")
    parser.add_argument("--tokenizer-path", default=str(ROOT / "tokenizer.model"))
    flags = parser.parse_args()
    model, shape = flags.folder.absolute() / flags.shape, SHAPES[flags.shape]
    flags.folder.mkdir(parents=True, exist_ok=True)
    if not model.exists():
        hf.save(random_checkpoint(flags.shape, torch.bfloat16), model, None)
    size, rate = 2 * shape.weights, memory_rate()
    print(f"{size / 1e9:.2f} GB of weights; memory is summed at {rate / 1e9:.1f} GB/s")
    settings = {"pretrained-model-path": model, "causal": True, "max_new_tokens": flags.tokens}
    settings |= {"tokenizer-path": os.path.abspath(flags.tokenizer_path)}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in flags.dtype:
            command = run_llama(settings | {"dtype": dtype})
            peaks, text = peak_memory(command, folder)
            anonymous, mapped = peaks["RssAnon"], peaks["RssFile"]
            print(
                f"{dtype}: {anonymous / 2**30:.2f} GiB anonymous, {anonymous / size:.2f} of the "
                f"file; {mapped / 2**30:.2f} GiB mapped"
            )
            speeds = ", ".join(re.findall(r"([\d.]+) tokens/s", text))
            read = (shape.weights - shape.vocab_size * shape.dim) * BYTES[dtype]
            print(f"  tokens/s {speeds}; memory limit {rate / read:.1f}")
            first = seconds_to_first_token(command, folder)
            print(f"  first token after {first:.1f} s, loading included")


if __name__ == "__main__":
    run_script(main)
