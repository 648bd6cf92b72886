"""A method that the tests add to the list: it scales what the head reads, and keeps the scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from base_llama import NoInitialWeights, replace
from minllama.common.settings import flag
from minllama.methods.base import Method
from minllama.methods.training import Training
from minllama.text.batches import Batch


@dataclass(frozen=True, kw_only=True)
class Toy(Method):
    """The new head and a learned scale of every element that it reads train; all else is frozen."""

    title = "toy (of the tests)"
    switch = "toy_scale"
    traits = frozenset({"added tensors", "frozen weights"})
    excludes: ClassVar = {"no new head": "so there is nothing to scale"}

    toy_scale: float | None = flag(None, "initial value of the scales", metavar="S")
    toy_penalty: float = flag(0.0, "weight of their squared distance from it")

    def adapt(self, model: nn.Module) -> None:
        model.llama.requires_grad_(False)
        replace(model, "classifier_head", ScaledLinear(model.classifier_head, self.toy_scale))

    def loss(self, training: Training, batch: Batch, loss: torch.Tensor) -> torch.Tensor:
        distance = training.model.classifier_head.scale - self.toy_scale
        return loss + self.toy_penalty * distance.square().sum()

    def merge(self, model: nn.Module) -> None:
        replace(model, "classifier_head", model.classifier_head.merged())


class ScaledLinear(nn.Linear):
    """W (s ∘ x) + b.

    Attributes:
        scale: s `(in_features,)`.
    """

    def __init__(self, linear: nn.Linear, scale: float):
        with NoInitialWeights():
            super().__init__(linear.in_features, linear.out_features)
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = nn.Parameter(torch.full((linear.in_features,), scale))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.scale * x)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        linear = nn.Linear(self.in_features, self.out_features)
        linear.weight.copy_(self.weight * self.scale)
        linear.bias.copy_(self.bias)
        return linear
