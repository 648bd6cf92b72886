"""LoRA: low-rank updates of frozen linear layers."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from base_llama import replace
from classifier import SentenceClassifier
from minllama.common.errors import InputError
from minllama.common.settings import flag
from minllama.kernels.cpu import FastLinear
from minllama.methods.base import Method


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Train low-rank updates of the linear layers of all layers, and freeze the rest."""

    title = "--tune lora (arXiv 2106.09685)"
    shardable = True
    tune = "lora"
    traits = frozenset({"added tensors", "frozen weights"})

    lora_rank: int = flag(8, "LoRA rank", low=1)
    lora_alpha: float = flag(16.0, "LoRA scale: updates are multiplied by alpha / rank")
    lora_dropout: float = flag(0.0, "dropout of the input of the updates", high=1)

    def adapt(self, model: SentenceClassifier) -> None:
        """Add LoRA to every linear layer of attention and feed-forward, and freeze the rest.

        Raises:
            InputError: the rank is larger than the width of the layers.
        """
        llama = model.llama
        if self.lora_rank > llama.config.dim:
            raise InputError(
                f"--lora_rank {self.lora_rank}: the layers are {llama.config.dim} wide"
            )
        llama.requires_grad_(False)
        for name, module in list(llama.layers.named_modules()):
            if isinstance(module, nn.Linear):
                lora = LoRALinear(module, self.lora_rank, self.lora_alpha, self.lora_dropout)
                replace(llama.layers, name, lora)

    def merge(self, model: SentenceClassifier) -> None:
        """Add all updates to the weights."""
        for name, module in list(model.named_modules()):
            if isinstance(module, LoRALinear):
                replace(model, name, module.merged())


class LoRALinear(FastLinear):
    """x Wᵀ + alpha/rank · dropout(x) Aᵀ Bᵀ (arXiv 2106.09685, equation 3).

    A is initialized like the weight of a linear layer. B begins at zero, so that nothing changes at
    first.

    Args:
        linear: the layer whose W this one shares.

    Attributes:
        weight: W `(out_features, in_features)`.
        lora_a, lora_b: A `(rank, in_features)` and B `(out_features, rank)`.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__(linear)
        device = linear.weight.device
        self.lora_a = nn.Parameter(torch.empty(rank, linear.in_features, device=device))
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.dropout = nn.Dropout(dropout)
        self.scale = alpha / rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(…, in_features)` to `(…, out_features)`."""
        update = F.linear(F.linear(self.dropout(x), self.lora_a), self.lora_b)
        return super().forward(x) + self.scale * update

    @torch.no_grad()
    def merged(self) -> FastLinear:
        """Return the linear layer that computes the same in one product, W + alpha/rank · B A.

        W is changed in place, so this layer must not be used any more.
        """
        self.weight += self.scale * (self.lora_b @ self.lora_a)
        return FastLinear(self)
