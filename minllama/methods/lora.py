"""LoRA: low-rank updates beside frozen linear layers."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from base_llama import Wrapper, replace
from llama import Llama
from minllama.common.errors import InputError
from minllama.common.settings import flag
from minllama.methods.recipe import Method


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Updates beside all linear layers of attention and feed-forward train; all else is frozen."""

    title = "--tune lora (arXiv 2106.09685)"
    takes_shards = True
    tune = "lora"
    traits = frozenset({"added tensors", "frozen weights"})

    lora_rank: int = flag(8, "rank of the updates", low=1)
    lora_alpha: float = flag(16.0, "their scale, times the rank")
    lora_dropout: float = flag(0.0, "of what they read", high=1)

    def adapt(self, model: nn.Module) -> None:
        """
        Raises:
            InputError: the rank is larger than that of the layers.
        """
        llama = model.llama
        if self.lora_rank > llama.config.dim:
            raise InputError(
                f"--lora_rank {self.lora_rank}: the layers are {llama.config.dim} wide"
            )
        llama.requires_grad_(False)
        add_lora(llama, self.lora_rank, self.lora_alpha, self.lora_dropout)

    def merge(self, model: nn.Module) -> None:
        """Merge all updates into the weights, but for those that would round them to bfloat16."""
        for name, module in list(model.named_modules()):
            if isinstance(module, LoRALinear) and module.wrapped.weight.dtype == torch.float32:
                replace(model, name, module.merged())


class LoRALinear(Wrapper):
    """x Wᵀ + alpha/rank · dropout(x) Aᵀ Bᵀ (arXiv 2106.09685, equation 3).

    A is drawn as a linear layer's weight and B begins at zero, so that nothing changes at first.

    Args:
        wrapped: the linear layer with W `(out_features, in_features)`.

    Attributes:
        lora_a, lora_b: A `(rank, in_features)` and B `(out_features, rank)`.
    """

    def __init__(self, wrapped: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__(wrapped)
        like = {"dtype": torch.float32, "device": wrapped.weight.device}
        self.lora_a = nn.Parameter(torch.empty(rank, wrapped.in_features, **like))
        self.lora_b = nn.Parameter(torch.zeros(wrapped.out_features, rank, **like))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.dropout = nn.Dropout(dropout)
        self.scale = alpha / rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(…, in_features)` to `(…, out_features)`."""
        update = F.linear(F.linear(self.dropout(x), self.lora_a), self.lora_b)
        return self.wrapped(x) + self.scale * update

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The linear layer that computes the same in one product, W + alpha/rank · B A.

        W is changed in place, so that this layer must not be used any more.
        """
        self.wrapped.weight += self.scale * (self.lora_b @ self.lora_a)
        return self.wrapped


def add_lora(llama: Llama, rank: int, alpha: float, dropout: float) -> None:
    """Put updates beside all linear layers of the layers."""
    for name, module in list(llama.layers.named_modules()):
        if isinstance(module, nn.Linear):
            replace(llama.layers, name, LoRALinear(module, rank, alpha, dropout))
