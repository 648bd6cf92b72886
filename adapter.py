"""Adapters: small bottlenecks behind frozen sub-layers."""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

from linear import Linear
from llama import Llama
from utils import InputError, adder, number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = adder(parser.add_argument_group("--tune adapter"))
    add("--adapter_size", type=number(int, 1), default=16, help="inner width of the adapters")


class Adapter(nn.Module):
    """h + relu(h Dᵀ) Uᵀ (arXiv 1902.00751; arXiv 2110.04366, section 2.2).

    Unlike in the first paper there are no biases, as in all of this model, and the norms do not
    train. U begins at zero, so that nothing changes at first.

    Attributes:
        down, up: D `(size, dim)` and U `(dim, size)`.
    """

    def __init__(self, dim: int, size: int):
        super().__init__()
        self.down, self.up = Linear(dim, size), Linear(size, dim)
        nn.init.zeros_(self.up.weight)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """`(batch, seqlen, dim)` to the same shape."""
        return h + self.up(F.relu(self.down(h)))


def add_adapters(llama: Llama, size: int) -> list[nn.Parameter]:
    """Put an adapter behind every attention and feed-forward layer; return their parameters.

    They are called by a hook, so that the names of the other parameters stay the checkpoint's.

    Raises:
        InputError: they would be wider than what they adapt.
    """
    if size > llama.config.dim:
        raise InputError(f"--adapter_size {size}: the layers are {llama.config.dim} wide")
    added = []
    for layer in llama.layers:
        for sublayer in (layer.attention, layer.feed_forward):
            sublayer.adapter = Adapter(llama.config.dim, size)
            sublayer.register_forward_hook(lambda module, _inputs, output: module.adapter(output))
            added += sublayer.adapter.parameters()
    return added
