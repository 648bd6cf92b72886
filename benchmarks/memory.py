"""The most memory that fine-tuning takes, in the reference's way of working and in ours.

    .venv/bin/python -m benchmarks.make_checkpoint random42M.pt
    .venv/bin/python -m benchmarks.memory --pretrained-model-path random42M.pt --data data/sst
    .venv/bin/python -m benchmarks.memory --pretrained-model-path random42M.pt \\
        --data data/cfimdb --batch_size 10 [--tokens 1024]

Each way is a process of its own. It trains on a few batches, the first of which has the longest
row of the data, and evaluates as many; batches of a fifth of the size are accumulated five at a
time. With `--tokens` every row is repeated or cut to that length.
"""

import argparse
import math
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from torch.utils.data import DataLoader

from benchmarks.finetune import DEVICE, Way
from benchmarks.ways import WAYS, make_parser, print_settings
from minllama.common.program import run_script
from minllama.kernels.cpu import keep_freed_memory
from minllama.tasks.epoch import train_epoch
from minllama.text.batches import Example
from minllama.text.labelled import read_labelled
from minllama.training.activation_checkpointing import checkpoint_activations
from minllama.training.precision import mixed_precision
from utils import peak_memory

FASTEST = WAYS["d causal bfloat16"]
SETTINGS = {name: (way, 1, False) for name, way in WAYS.items()} | {  # --grad_accum, checkpointing
    "  --grad_accum 5": (FASTEST, 5, False),
    "  --activation_checkpointing": (FASTEST, 1, True),
    "  both": (FASTEST, 5, True),
}


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__, batch_size=80)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--tokens", type=int, help="length of every row")
    return parser.parse_args()


def measure(flags: argparse.Namespace, name: str, num_labels: int) -> int:
    """Peak memory of this process, in bytes, after some training and evaluation."""
    (causal, dtype, reference), grad_accum, checkpointing = SETTINGS[name]
    torch.set_num_threads(flags.threads)
    if not reference:
        keep_freed_memory()
    flags.batch_size //= grad_accum
    way = Way(flags, causal, dtype, reference, num_labels)
    if checkpointing:
        checkpoint_activations(way.model.llama.layers)
    with way.patched():
        for train, loader in ((True, way.train_loader), (False, way.dev_loader)):
            loader = longest_first(loader, flags.batches * grad_accum, flags.tokens)
            if train:
                train_epoch(way.model, loader, way.optimizer, way.loss, 0, grad_accum)
            else:
                with mixed_precision(DEVICE, dtype):
                    way.evaluate_all(loader, way.model, DEVICE)
    return peak_memory(DEVICE)


def longest_first(loader: DataLoader, n: int, tokens: int | None) -> DataLoader:
    """The batch with the longest row, and the next ones as they come.

    Args:
        tokens: the length that every row gets, by repetition or by a cut.
    """
    data, batches = loader.dataset, list(loader.batch_sampler)
    lengths = [max(len(data[i][2]) for i in rows) for rows in batches]
    batches.insert(0, batches.pop(lengths.index(max(lengths))))
    if tokens is not None:
        data = [
            Example(sentence, label, (ids * math.ceil(tokens / len(ids)))[:tokens])
            for sentence, label, ids in data
        ]
    return DataLoader(data, batch_sampler=batches[:n], collate_fn=loader.collate_fn)


def main() -> None:
    flags = parse()
    print_settings(flags)
    num_labels = 1 + max(label for label, _ in read_labelled(f"{flags.data}-train.txt"))
    for name in SETTINGS:
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            peak = process.submit(measure, flags, name, num_labels).result()
        print(f"{name:32}{peak / 2**30:6.2f} GiB")


if __name__ == "__main__":
    run_script(main)
