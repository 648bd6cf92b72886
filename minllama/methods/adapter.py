"""Adapters: small bottlenecks behind frozen sub-layers."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from base_llama import Wrapper, replace
from minllama.common.errors import InputError
from minllama.common.settings import flag
from minllama.methods.recipe import Method


@dataclass(frozen=True, kw_only=True)
class Adapters(Method):
    """An adapter behind every attention and feed-forward layer trains; all else is frozen."""

    title = "--tune adapter (arXiv 1902.00751)"
    takes_shards = True
    tune = "adapter"
    traits = frozenset({"added tensors", "frozen weights"})

    adapter_size: int = flag(16, "inner width of the adapters", low=1)

    def adapt(self, model: nn.Module) -> None:
        """
        Raises:
            InputError: they would be wider than what they adapt.
        """
        dim = model.llama.config.dim
        if self.adapter_size > dim:
            raise InputError(f"--adapter_size {self.adapter_size}: the layers are {dim} wide")
        model.llama.requires_grad_(False)
        for layer in model.llama.layers:
            for name in ("attention", "feed_forward"):
                replace(layer, name, Adapted(layer.get_submodule(name), dim, self.adapter_size))


class Adapted(Wrapper):
    """A sub-layer with an adapter behind it."""

    def __init__(self, wrapped: nn.Module, dim: int, size: int):
        super().__init__(wrapped)
        self.adapter = Adapter(dim, size).to(next(wrapped.parameters()).device)

    def forward(self, *args: Any) -> torch.Tensor:
        """Arguments and shapes are those of the sub-layer."""
        return self.adapter(self.wrapped(*args))


class Adapter(nn.Module):
    """h + relu(h Dᵀ) Uᵀ (arXiv 1902.00751; arXiv 2110.04366, section 2.2).

    Unlike in the first paper there are no biases, as in all of this model, and the norms do not
    train. U begins at zero, so that nothing changes at first.

    Attributes:
        down, up: D `(size, dim)` and U `(dim, size)`.
    """

    def __init__(self, dim: int, size: int):
        super().__init__()
        self.down = nn.Linear(dim, size, bias=False)
        self.up = nn.Linear(size, dim, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """`(batch, seqlen, dim)` to the same shape."""
        return h + self.up(F.relu(self.down(h)))
