"""LoRA: low-rank updates beside frozen linear layers."""

import argparse
import math

import torch
import torch.nn.functional as F
from torch import nn

from linear import Linear
from llama import Llama
from utils import InputError, adder, number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = adder(parser.add_argument_group("--tune lora"))
    add("--lora_rank", type=number(int, 1), default=8, help="rank of the updates")
    add("--lora_alpha", type=number(float, 0), default=16.0, help="their scale, times the rank")
    add("--lora_dropout", type=number(float, 0, 1), default=0.0, help="of what they read")


class LoRALinear(Linear):
    """x Wᵀ + alpha/rank · dropout(x) Aᵀ Bᵀ (arXiv 2106.09685, equation 3).

    A is drawn as a linear layer's weight and B begins at zero, so that nothing changes at first.

    Attributes:
        weight: W `(out_features, in_features)`, the same parameter as that of `linear`.
        lora_a, lora_b: A `(rank, in_features)` and B `(out_features, rank)`.
    """

    def __init__(self, linear: Linear, rank: int, alpha: float, dropout: float):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, None
        self.lora_a = nn.Parameter(linear.weight.new_empty(rank, self.in_features))
        self.lora_b = nn.Parameter(linear.weight.new_zeros(self.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.dropout = nn.Dropout(dropout)
        self.scale = alpha / rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(…, in_features)` to `(…, out_features)`."""
        update = F.linear(F.linear(self.dropout(x), self.lora_a), self.lora_b)
        return super().forward(x) + self.scale * update

    def merged(self) -> Linear:
        """The linear layer that computes the same in one product, W + alpha/rank · B A."""
        linear = Linear(self.in_features, self.out_features)
        update = self.scale * (self.lora_b @ self.lora_a)
        linear.weight = nn.Parameter(self.weight.detach() + update)
        return linear


def add_lora(llama: Llama, rank: int, alpha: float, dropout: float) -> list[nn.Parameter]:
    """Put updates beside all linear layers of attention and feed-forward; return them.

    Raises:
        InputError: the rank is larger than that of the layers.
    """
    if rank > llama.config.dim:
        raise InputError(f"--lora_rank {rank}: the layers are {llama.config.dim} wide")
    updates = []
    for module in list(llama.layers.modules()):
        for name, child in list(module.named_children()):
            if type(child) is Linear:
                layer = LoRALinear(child, rank, alpha, dropout)
                setattr(module, name, layer)
                updates += [layer.lora_a, layer.lora_b]
    return updates


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Merge all updates of a model into its weights, for inference."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LoRALinear):
                setattr(module, name, child.merged())
