"""What the benchmarks of fine-tuning and prompting compare, and the flags that they share."""

import argparse
import platform
from collections.abc import Sequence

import torch
from torch.utils.data import DataLoader

from benchmarks.reference_way import make_reference_loader
from minllama.common.program import ArgumentParser
from minllama.text.batches import Example, make_loader
from tokenizer import Tokenizer

WAYS = {  # causal, dtype, as the reference works
    "a unmasked float32, reference": (False, "float32", True),
    "b unmasked float32": (False, "float32", False),
    "c causal float32": (True, "float32", False),
    "d causal bfloat16": (True, "bfloat16", False),
}


def make_parser(description: str | None, batch_size: int) -> ArgumentParser:
    """A parser with the flags of the model, the data and the threads."""
    parser = ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrained-model-path", required=True)
    parser.add_argument("--tokenizer-path", default="tokenizer.model")
    parser.add_argument("--data", default="data/sst", help="path up to -train.txt")
    parser.add_argument("--batch_size", type=int, default=batch_size)
    parser.add_argument("--threads", type=int, default=2)
    return parser


def loader_for(
    data: Sequence[Example],
    batch_size: int,
    tokenizer: Tokenizer,
    *,
    causal: bool,
    reference: bool,
    shuffle: bool = False,
) -> DataLoader:
    """The batches of a way of working; `shuffle` is for training."""
    if reference:
        return make_reference_loader(data, batch_size, tokenizer, shuffle=shuffle)
    return make_loader(data, batch_size, tokenizer.pad_id, causal=causal, shuffle=shuffle)


def print_settings(flags: argparse.Namespace) -> None:
    print(f"{platform.machine()}, torch {torch.__version__}, {vars(flags)}")
