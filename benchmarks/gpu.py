"""How fast a GPU trains, and which part of its peak that is.

    .venv/bin/python -m benchmarks.gpu --shape 42m --dtype bfloat16 --compile
    torchrun --nproc_per_node 8 -m benchmarks.gpu --shape 1.1b --dtype bfloat16 --shard

Prints tokens per second, the model FLOPs utilization (arXiv 2204.02311, appendix B: 6 FLOPs for
each weight and token, and 12 · layers · dim · context for attention, over the peak of the GPU), and
the peak of its memory. `--transformers` takes turns with the same model in Transformers. Peaks are
those of the data sheets, for dense bfloat16 products.
"""

import argparse
import statistics
import time

import torch

from benchmarks.scaling import losses_of_step
from common.errors import InputError, in_gibibytes
from common.program import ArgumentParser, run_script
from llama import Llama
from optimizer import AdamW
from training import distributed
from training.checkpointing import checkpoint_activations
from training.cpu import accelerate
from training.plan import PlanSettings
from training.step import compile_layers, update
from utils import peak_memory

PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "L4": 121e12, "4090": 165e12}
TURNS = 3


def model_flops(settings: PlanSettings, n_weights: int) -> float:
    """FLOPs that a token takes, forward and backward."""
    config = settings.config()
    return 6 * n_weights + 12 * config.n_layers * config.dim * config.max_seq_len


def seconds_of(step, n: int) -> float:
    """Median seconds of a step, after three that are not counted."""
    seconds = []
    for i in range(n + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step(i)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[3:])


def our_step(settings: PlanSettings, args: argparse.Namespace):
    llama = Llama(settings.config())
    accelerate(llama)
    if args.activation_checkpointing:
        checkpoint_activations(llama.layers)
    llama = llama.cuda()
    if args.compile:
        compile_layers(llama.layers)
    dtype = args.dtype
    if args.shard and distributed.shard(llama, llama.layers, dtype):
        dtype = "float32"
    optimizer = AdamW(llama.parameters(), weight_decay=0.1)
    model = distributed.data_parallel(llama, all_used=True)
    batches = batches_of(settings)

    def step(i: int) -> None:
        losses = losses_of_step(model, batches, dtype)
        update(llama, losses, optimizer, f"step {i}", max_norm=1.0)

    return step, sum(p.numel() for p in llama.parameters())


def their_step(settings: PlanSettings, args: argparse.Namespace):
    """The same training by Transformers and torch.optim.AdamW, fused."""
    from transformers import LlamaConfig as TheirConfig
    from transformers import LlamaForCausalLM

    ours = settings.config()
    config = TheirConfig(
        vocab_size=ours.vocab_size,
        hidden_size=ours.dim,
        intermediate_size=ours.ffn_dim,
        num_hidden_layers=ours.n_layers,
        num_attention_heads=ours.n_heads,
        num_key_value_heads=ours.n_kv_heads or ours.n_heads,
        max_position_embeddings=ours.max_seq_len,
        tie_word_embeddings=ours.tie_embeddings,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).cuda()
    if args.compile:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    batches = batches_of(settings)

    def step(i: int) -> None:
        optimizer.zero_grad()
        for batch in batches:
            with torch.autocast("cuda", torch.bfloat16, enabled=args.dtype == "bfloat16"):
                loss = model(input_ids=batch, labels=batch).loss
            (loss / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def batches_of(settings: PlanSettings) -> torch.Tensor:
    config = settings.config()
    shape = (settings.grad_accum, settings.batch_size, config.max_seq_len + 1)
    return torch.randint(config.vocab_size, shape).cuda()


def main() -> None:
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="42m", help="42m, 1.1b or 7b")
    parser.add_argument("--context", type=int, help="tokens of a row")
    parser.add_argument("--batch_size", type=int, default=16, help="rows of all GPUs together")
    parser.add_argument("--grad_accum", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--steps", type=int, default=10)
    for name in ("compile", "shard", "activation_checkpointing", "transformers"):
        parser.add_argument(f"--{name}", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise InputError("benchmarks.gpu: PyTorch finds no CUDA device here")
    with distributed.joined():
        settings = PlanSettings(
            shape=args.shape,
            context=args.context,
            batch_size=args.batch_size,
            grad_accum=args.grad_accum,
            gpus=distributed.n_processes(),
        )
        name = torch.cuda.get_device_name()
        peak = next((flops for gpu, flops in PEAKS.items() if gpu in name), None)
        n_tokens = args.batch_size * args.grad_accum * settings.config().max_seq_len
        step, n_weights = our_step(settings, args)
        theirs = their_step(settings, args) if args.transformers else None
        flops = model_flops(settings, n_weights) * n_tokens / distributed.n_processes()
        print(f"{name}, {distributed.n_processes()} of them; {n_weights:,} weights, {args.dtype}")
        for turn in range(1, TURNS + 1):
            seconds = seconds_of(step, args.steps)
            used = "" if peak is None else f", {flops / seconds / peak:.0%} of the peak"
            print(f"turn {turn}: {n_tokens / seconds:,.0f} tokens/s{used}")
            if theirs is not None:
                ratio = seconds_of(theirs, args.steps) / seconds
                print(f"  {ratio:.2f} times the speed of Transformers")
        print(f"peak memory {in_gibibytes(peak_memory(torch.device('cuda')))}")


if __name__ == "__main__":
    run_script(main)
