"""Memory and speed of large models on a small machine, with random weights of the true shapes.

    .venv/bin/python -m pip install -r requirements-extra.txt
    .venv/bin/python -m benchmarks.large FOLDER --shape 1.1b --dtype bfloat16 int8
    .venv/bin/python -m benchmarks.large FOLDER --shape 7b --dtype int8
    .venv/bin/python -m benchmarks.large FOLDER --shape 1.1b --finetune

A folder of Hugging Face's layout in bfloat16 is written to FOLDER, unless it is there: 2.2 GB for
TinyLlama's 1.1B, 13.5 GB in shards for Llama 2's 7B. Then `run_llama.py --causal` generates from it
in a process of its own, or fine-tunes with LoRA. Its memory is read every 20 ms: the anonymous
part, which the system cannot drop, and the mapped pages of files, which it can. The speed of
decoding stands beside the memory limit: what is read for a token over the rate at which memory is
summed.
The first token is timed from the start of the process. Linux only.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.startup import seconds_to_first_token
from config import LlamaConfig
from minllama.checkpoints import hf
from minllama.checkpoints.layout import shapes_of
from minllama.common.program import ArgumentParser, run_script
from minllama.kernels.quantize import BYTES

ROOT = Path(__file__).parent.parent
SHAPES = {
    "1.1b": {"dim": 2048, "n_layers": 22, "n_heads": 32, "n_kv_heads": 4, "hidden_dim": 5632},
    "7b": {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "hidden_dim": 11008},
}
CONTEXT = {"1.1b": 2048, "7b": 4096}
SHARD = 2 << 30  # bytes


def make_model(folder: Path, shape: str) -> int:
    """Write a model with random weights, shard by shard; returns the bytes of its weights."""
    from safetensors.torch import save_file

    config = LlamaConfig(
        vocab_size=32000,
        max_seq_len=CONTEXT[shape],
        causal=True,
        tie_embeddings=False,
        **SHAPES[shape],
    )
    ours = shapes_of(config)
    shapes = {name: ours[our_name] for name, our_name in hf.tensor_names(config).items()}
    if not (folder / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(0)
        files, shard, size = {}, {}, 0
        for name, dims in tqdm(shapes.items(), desc="make", unit=" tensors", leave=False):
            weight = torch.ones(dims)
            if len(dims) == 2:
                weight.normal_(std=0.02, generator=generator)
            shard[name] = weight.bfloat16()
            size += shard[name].numel() * 2
            if size > SHARD or name == list(shapes)[-1]:
                file = f"model-{len(set(files.values())) + 1:05}.safetensors"
                save_file(shard, folder / file)
                files |= dict.fromkeys(shard, file)
                shard, size = {}, 0
        hf.write_json(folder / "model.safetensors.index.json", {"weight_map": files})
        hf.write_json(folder / "config.json", hf.config_json(config, torch.bfloat16))
    return sum(torch.Size(dims).numel() * 2 for dims in shapes.values())


def peaks(command: list[object], cwd: str) -> tuple[dict[str, int], str, float]:
    """Run a command; its largest anonymous and mapped memory in bytes, what it said, seconds."""
    most = {"RssAnon": 0, "RssFile": 0}
    start = time.perf_counter()
    with open(Path(cwd, "log"), "w") as log:
        process = subprocess.Popen(command, cwd=cwd, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                break
            for name in most:
                if found := re.search(rf"{name}:\s+(\d+) kB", status):
                    most[name] = max(most[name], int(found[1]) * 1024)
            time.sleep(0.02)
    text = Path(cwd, "log").read_text()
    if process.wait() != 0:
        sys.exit(f"{text}\nthe command failed")
    return most, text, time.perf_counter() - start


def memory_rate() -> float:
    """Bytes per second at which a tensor of 1 GiB is summed, at best."""
    gibibyte = torch.ones(2**28)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        gibibyte.sum()
        best = max(best, 2**30 / (time.perf_counter() - start))
    return best


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the models are, or are to be written")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="1.1b")
    parser.add_argument("--dtype", nargs="+", choices=tuple(BYTES), default=["bfloat16", "int8"])
    parser.add_argument("--tokens", type=int, default=32, help="to generate, at temperature 0")
    parser.add_argument("--tokenizer-path", default=str(ROOT / "tokenizer.model"))
    parser.add_argument("--finetune", action="store_true", help="with LoRA, in place of generating")
    args = parser.parse_args()
    model = args.folder.absolute() / args.shape
    size = make_model(model, args.shape)
    rate = memory_rate()
    print(
        f"{args.shape}: weights of {size / 1e9:.2f} GB; memory is summed at {rate / 1e9:.1f} GB/s"
    )
    command = [sys.executable, ROOT / "run_llama.py", "--pretrained-model-path", model, "--causal"]
    command += ["--tokenizer-path", os.path.abspath(args.tokenizer_path)]
    with tempfile.TemporaryDirectory() as folder:
        idle, _, _ = peaks([sys.executable, "-c", "import torch; torch.ones(1)"], folder)
        print(f"import torch: {idle['RssAnon'] / 2**30:.2f} GiB anonymous")
        if args.finetune:
            reviews = ROOT / "data/demo"
            flags = [
                "--option",
                "finetune",
                "--tune",
                "lora",
                "--dtype",
                "bfloat16",
                "--shots",
                "8",
            ]
            flags += ["--activation_checkpointing", "--epochs", "1", "--skip_train_eval"]
            for split in ("train", "dev", "test"):
                lines = (reviews / f"reviews-{split}.txt").read_text().splitlines(keepends=True)
                Path(folder, f"toy-{split}.txt").write_text("".join(lines[:100]))
                flags += [f"--{split}", f"toy-{split}.txt"]
            flags += ["--label-names", reviews / "reviews-label-mapping.json"]
            most, text, seconds = peaks(command + flags, folder)
            report("finetune --tune lora", most, size)
            print(f"{seconds:.0f} s; {re.search('epoch 0: .*', text)[0]}")
            return
        for dtype in args.dtype:
            flags = ["--dtype", dtype, "--max_new_tokens", str(args.tokens)]
            most, text, _ = peaks(command + flags, folder)
            report(f"generate --dtype {dtype}", most, size)
            speeds = re.findall(r"([\d.]+) tokens/s", text)
            read = (size / 2 - 32000 * SHAPES[args.shape]["dim"]) * BYTES[dtype]
            limit = rate / read
            print(f"  tokens/s {', '.join(speeds)}; memory limit {limit:.1f}")
            first = seconds_to_first_token([*map(str, command), *flags], folder)
            print(f"  first token after {first:.1f} s, loading included")


def report(what: str, most: dict[str, int], size: int) -> None:
    anonymous = most["RssAnon"]
    print(
        f"{what}: {anonymous / 2**30:.2f} GiB anonymous, {anonymous / size:.2f} of the file; "
        f"{most['RssFile'] / 2**30:.2f} GiB mapped"
    )


if __name__ == "__main__":
    run_script(main)
