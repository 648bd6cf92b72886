"""How near `training/plan.py` comes to the memory that a training on a CPU really takes.

    .venv/bin/python -m benchmarks.plan [--threads 1]

Each row is a process of its own. It takes two steps of pre-training on random tokens. Measured is
its peak resident memory above what it had before the model was built; planned is the sum of
`python -m training.plan --device cpu`. Freed memory goes back to the system at once (malloc's
threshold for that is held at 64 KiB), so that the peak is what is in use. `--option pretrain` keeps
freed memory for speed, and may take more. Linux only.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from config import LlamaConfig
from llama import Llama
from optimizer import AdamW
from tasks.scores import NextTokenScores
from training.checkpointing import checkpoint_activations
from training.cpu import accelerate
from training.plan import GIBIBYTE, PlanSettings, make_plan
from training.step import mixed_precision, update
from utils import peak_memory

CPU = torch.device("cpu")
STEPS = 2  # the second one finds the moments there
SMALL = {"vocab_size": 2048, "dim": 256, "n_layers": 6, "n_heads": 4}  # pretrain's default shape
CASES = {
    "6.5M, 16 rows of 256": PlanSettings(**SMALL, context=256, batch_size=16),
    "6.5M, 4 rows of 1024": PlanSettings(**SMALL, context=1024, batch_size=4),
    "42M, 4 rows of 512": PlanSettings(shape="42m", context=512, batch_size=4),
    "42M, 2 rows of 1024": PlanSettings(shape="42m", batch_size=2),
}
WAYS = {
    "": {},
    " bfloat16": {"dtype": "bfloat16"},
    " --activation_checkpointing": {"activation_checkpointing": True},
    " --grad_accum 2": {"grad_accum": 2},
}


def cases() -> dict[str, PlanSettings]:
    """What is measured, by name."""
    return {
        name + way: settings.replace(device="cpu", **flags)
        for name, settings in CASES.items()
        for way, flags in WAYS.items()
    }


def resident() -> int:
    """Memory of this process now, in bytes."""
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def train(settings: PlanSettings, config: LlamaConfig) -> None:
    """A few steps of pre-training, as `tasks/pretrain.py` takes them."""
    llama = Llama(config)
    accelerate(llama)
    if settings.activation_checkpointing:
        checkpoint_activations(llama.layers)
    optimizer = AdamW(llama.parameters(), weight_decay=0.1)
    shape = settings.rows, config.max_seq_len

    def losses():
        for _ in range(settings.grad_accum):
            tokens = torch.randint(config.vocab_size, shape)
            with mixed_precision(CPU, settings.dtype):
                logits = llama.output(llama.hidden_states(tokens))
            scores = NextTokenScores(logits, tokens, bos_id=1)
            del logits
            yield scores.loss / settings.grad_accum

    for step in range(STEPS):
        update(llama, losses(), optimizer, f"step {step}", max_norm=1.0)


def measure(settings: PlanSettings) -> int:
    """Peak bytes of a training in this process, above those of the process before it."""
    tiny = LlamaConfig(dim=32, n_layers=1, n_heads=2, n_kv_heads=2, vocab_size=64, max_seq_len=32)
    train(settings, tiny)  # loads the libraries
    before = resident()
    train(settings, settings.config())
    return peak_memory(CPU) - before


def measured(settings: PlanSettings, threads: int) -> int:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.plan", "--threads", str(threads)]
    command += ["--case", json.dumps(settings.plain())]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return int(result.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--case", help="measure these settings, as JSON, in this process")
    flags = parser.parse_args()
    if flags.case is not None:
        torch.set_num_threads(flags.threads)
        print(measure(PlanSettings(**json.loads(flags.case))))
        return
    print(f"{'':50}{'planned':>12}{'measured':>12}{'ratio':>7}")
    for name, settings in cases().items():
        planned, peak = make_plan(settings).total, measured(settings, flags.threads)
        print(
            f"{name:50}{planned / GIBIBYTE:8.3f} GiB{peak / GIBIBYTE:8.3f} GiB{planned / peak:7.2f}"
        )


if __name__ == "__main__":
    main()
