"""Decoding speed of the command line, against llama2.c or Transformers, in turns.

    .venv/bin/python -m pip install -r requirements-extra.txt -r benchmarks/requirements.txt
    .venv/bin/python -m benchmarks.make_checkpoint random42M.pt
    .venv/bin/python -m benchmarks.decode --pretrained-model-path random42M.pt --transformers
    .venv/bin/python -m benchmarks.decode --pretrained-model-path random42M.pt --compile \\
        --llama2c llama2.c --tokenizer-path tokenizer.model

256 tokens at temperature 0, causal. The table has tokens per second, and in brackets the ratio to
the first line: llama2.c's `run.c`, or Transformers' `generate` in float32 with the same weights and
batch size. llama2.c's sources are at https://github.com/karpathy/llama2.c, and are compiled here as
its README says for speed.
"""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from benchmarks.compare import make_parser, print_table, run, take_turns
from experiments.runs import ROOT, run_command, run_llama
from minllama.common.errors import InputError
from minllama.common.program import positive, run_script
from tokenizer import Tokenizer

DTYPES = ("float32", "bfloat16", "int8")
SPEED = re.compile(r"([\d.]+) tokens/s|achieved tok/s: ([\d.]+)")


def measure(command: list[str], threads: int) -> dict[str, float]:
    """Tokens per second, as a command prints them on standard error."""
    _, errors = run(command, threads)
    found = SPEED.search(errors)
    if found is None:
        raise RuntimeError(f"{command} printed no speed: {errors}")
    return {"tokens/s": float(found[1] or found[2])}


def convert(model: str, out: str, to: str, dtype: str) -> None:
    command = [sys.executable, "-m", "minllama.checkpoints.convert", model, out]
    run_command([*command, "--to", to, "--dtype", dtype], cwd=ROOT)


def peers(flags: argparse.Namespace, model: str, folder: str) -> dict[str, list[str]]:
    """The commands of what we are compared with, compiled and converted into a folder."""
    commands: dict[str, list[str]] = {}
    if flags.llama2c:
        tokenizer = Tokenizer(tokenizer_model=flags.tokenizer_path)
        Path(folder, "tokenizer.bin").write_bytes(tokenizer.to_llama2c())
        for name, dtype in (("run", "float32"), ("runq", "int8")):
            source, program = f"{flags.llama2c}/{name}.c", f"{folder}/{name}"
            if not Path(source).is_file():
                raise InputError(f"{source}: no such file; --llama2c names llama2.c's folder")
            gcc = ["gcc", "-Ofast", "-fopenmp", "-march=native", source, "-lm", "-o", program]
            subprocess.run(gcc, check=True)
            convert(model, f"{program}.bin", "llama2c", dtype)
            options = ["-z", f"{folder}/tokenizer.bin", "-t", "0", "-n", str(flags.max_new_tokens)]
            commands[f"llama2.c {name}"] = [program, f"{program}.bin", *options]
    if flags.transformers:
        if importlib.util.find_spec("transformers") is None:
            raise InputError("--transformers: `pip install -r benchmarks/requirements.txt` first")
        convert(model, f"{folder}/hf", "hf", "float32")
        peer = [sys.executable, "-m", "benchmarks.transformers_peer", f"{folder}/hf"]
        commands["Transformers"] = [*peer, str(flags.batch_size), str(flags.max_new_tokens)]
    return commands


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--pretrained-model-path", required=True)
    parser.add_argument("--tokenizer-path", default="tokenizer.model")
    parser.add_argument("--llama2c", metavar="DIR", help="with its run.c and runq.c")
    parser.add_argument("--transformers", action="store_true")
    parser.add_argument("--compile", action="store_true", help="compare our --compile too")
    parser.add_argument("--max_new_tokens", type=positive, default=256)
    parser.add_argument("--batch_size", type=positive, default=1)
    flags = parser.parse_args()
    model = os.path.abspath(flags.pretrained_model_path)
    settings: dict[str, object] = {"causal": True, "temperature": 0, "prefix": ""}
    settings |= {"pretrained-model-path": model, "max_new_tokens": flags.max_new_tokens}
    settings |= {"tokenizer-path": os.path.abspath(flags.tokenizer_path)}
    settings |= {"num_samples": flags.batch_size}
    with tempfile.TemporaryDirectory() as folder:
        commands = peers(flags, model, folder)
        for dtype in DTYPES:
            commands[dtype] = run_llama(settings | {"dtype": dtype})
            if flags.compile:
                commands[f"{dtype} --compile"] = [*commands[dtype], "--compile"]
        contenders = {
            name: partial(measure, command, flags.threads) for name, command in commands.items()
        }
        print_table(take_turns(contenders, flags.rounds))


if __name__ == "__main__":
    run_script(main)
