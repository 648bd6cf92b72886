"""How near `training/plan.py` comes to the memory that a training on a CPU really takes.

    .venv/bin/python -m benchmarks.plan [--gpus 2] [--threads 1]

Each row is a process of its own, or with --gpus several that train together, by PyTorch's DDP or
FSDP2. It takes three steps of pre-training on random tokens. Measured is the peak resident memory
of the first process above what it had before the model was built. Planned is what
`python -m training.plan --device cpu` has as the most at one time. Freed memory goes back to the
system at once (malloc's threshold for that is held at 64 KiB), so that the peak is what is in use.
`--option pretrain` keeps freed memory for speed, and may take more. Linux only.
"""

import json
import os
import re
import subprocess
import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

import torch
from torch import nn

from common.program import ArgumentParser, run_script
from config import LlamaConfig
from llama import Llama
from optimizer import AdamW
from tasks.scores import NextTokenScores
from training.checkpointing import checkpoint_activations
from training.cpu import accelerate
from training.plan import GIBIBYTE, PlanSettings, make_plan
from training.step import mixed_precision, update

CPU = torch.device("cpu")
STEPS = 3  # in the second DDP makes its buffers anew, which are filled by its end
SMALL = {"vocab_size": 2048, "dim": 256, "n_layers": 6, "n_heads": 4}  # pretrain's default shape
CASES = {
    "5.3M, 16 rows of 256": PlanSettings(**SMALL, context=256, batch_size=16),
    "5.3M, 4 rows of 1024": PlanSettings(**SMALL, context=1024, batch_size=4),
    "42M, 4 rows of 512": PlanSettings(shape="42m", context=512, batch_size=4),
    "42M, 2 rows of 1024": PlanSettings(shape="42m", batch_size=2),
}
WAYS = {
    "": {},
    " bfloat16": {"dtype": "bfloat16"},
    " --activation_checkpointing": {"activation_checkpointing": True},
    " --grad_accum 2": {"grad_accum": 2},
}


def cases(gpus: int) -> dict[str, PlanSettings]:
    """What is measured, by name."""
    ways = WAYS
    if gpus > 1:
        ways = ways | {f" --shard{name}": {"shard": True, **way} for name, way in WAYS.items()}
    return {
        name + way: settings.replace(device="cpu", gpus=gpus, **flags)
        for name, settings in CASES.items()
        for way, flags in ways.items()
    }


def resident(name: str = "VmRSS") -> int:
    """Memory of this process in bytes: now, or as "VmHWM" at most so far."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


class NextTokenLoss(nn.Module):
    """Model and loss as one module, as DDP and FSDP2 want it."""

    def __init__(self, llama: Llama, dtype: str):
        super().__init__()
        self.llama, self.dtype = llama, dtype

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The loss of ids `(batch, seqlen)`, a scalar."""
        with mixed_precision(CPU, self.dtype):
            logits = self.llama.output(self.llama.hidden_states(tokens))
        return NextTokenScores(logits, tokens, bos_id=1).loss


def spread(model: NextTokenLoss, settings: PlanSettings) -> nn.Module:
    """The model as several processes train it together."""
    if settings.gpus == 1:
        return model
    if not settings.shard:
        return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    dtype = torch.bfloat16 if settings.dtype == "bfloat16" else None
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in model.llama.layers:
        fully_shard(layer, mp_policy=policy)
    return fully_shard(model, mp_policy=policy, reshard_after_forward=False)


def train(settings: PlanSettings, config: LlamaConfig) -> None:
    """A few steps of pre-training, as `tasks/pretrain.py` takes them."""
    llama = Llama(config)
    accelerate(llama)
    if settings.activation_checkpointing:
        checkpoint_activations(llama.layers)
    model = spread(NextTokenLoss(llama, settings.dtype), settings)
    optimizer = AdamW(model.parameters(), weight_decay=0.1)
    shape = settings.rows, config.max_seq_len

    def losses():
        for i in range(settings.grad_accum):
            model.require_backward_grad_sync = i == settings.grad_accum - 1  # DDP's
            yield model(torch.randint(config.vocab_size, shape)) / settings.grad_accum

    for step in range(STEPS):
        update(model, losses(), optimizer, f"step {step}")


def measure(settings: PlanSettings) -> int:
    """Peak bytes of a training in this process, above those of the process before it."""
    tiny = LlamaConfig(dim=32, n_layers=1, n_heads=2, n_kv_heads=2, vocab_size=64, max_seq_len=32)
    train(settings, tiny)  # loads the libraries
    before = resident()
    train(settings, settings.config())
    return resident("VmHWM") - before


def measured(settings: PlanSettings, threads: int) -> int:
    """The same in a process of its own, or in the first of several."""
    command = [sys.executable, "-m", "benchmarks.plan", "--threads", str(threads)]
    command += ["--case", json.dumps(settings.plain())]
    if settings.gpus > 1:
        processes = ["--standalone", f"--nproc-per-node={settings.gpus}"]
        command[1:2] = ["-m", "torch.distributed.run", *processes, "-m"]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return int(result.stdout)


def measure_here(settings: PlanSettings) -> None:
    """Print what was measured in this process, if it is the first."""
    if settings.gpus == 1:
        print(measure(settings))
        return
    torch.distributed.init_process_group("gloo")
    peak = measure(settings)
    if torch.distributed.get_rank() == 0:
        print(peak)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=1, help="processes that train together")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--case", help="measure these settings, as JSON, in this process")
    flags = parser.parse_args()
    if flags.case is not None:
        torch.set_num_threads(flags.threads)
        measure_here(PlanSettings(**json.loads(flags.case)))
        return
    print(f"{'':60}{'planned':>12}{'measured':>12}{'ratio':>7}")
    for name, settings in cases(flags.gpus).items():
        planned, peak = make_plan(settings).total, measured(settings, flags.threads)
        sizes = "".join(f"{size / GIBIBYTE:8.3f} GiB" for size in (planned, peak))
        print(f"{name:60}{sizes}{planned / peak:7.2f}", flush=True)


if __name__ == "__main__":
    run_script(main)
