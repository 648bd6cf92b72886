"""Adapters: small bottlenecks after frozen sub-layers."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from classifier import SentenceClassifier
from llama import LlamaLayer
from minllama.common.errors import InputError
from minllama.common.settings import flag
from minllama.methods.base import Method


@dataclass(frozen=True, kw_only=True)
class Adapters(Method):
    """Train an adapter after every attention and feed-forward layer, and freeze the rest."""

    title = "--tune adapter (arXiv 1902.00751)"
    shardable = True
    tune = "adapter"
    traits = frozenset({"added tensors", "frozen weights"})

    adapter_size: int = flag(16, "inner width of the adapters", low=1)

    def adapt(self, model: SentenceClassifier) -> None:
        """Insert adapters, and freeze the rest.

        Raises:
            InputError: the adapters would be wider than the layers.
        """
        dim = model.llama.config.dim
        if self.adapter_size > dim:
            raise InputError(f"--adapter_size {self.adapter_size}: the layers are {dim} wide")
        model.llama.requires_grad_(False)
        for layer in model.llama.layers:
            assert isinstance(layer, LlamaLayer)
            add_adapter(layer.attention, dim, self.adapter_size)
            add_adapter(layer.feed_forward, dim, self.adapter_size)


def add_adapter(sub_layer: nn.Module, dim: int, size: int) -> None:
    """Let a sub-layer pass its output through a new adapter, by a forward hook."""
    sub_layer.adapter = Adapter(dim, size).to(next(sub_layer.parameters()).device)
    sub_layer.register_forward_hook(apply_adapter)


def apply_adapter(sub_layer: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    """The forward hook: `(batch, seqlen, dim)` to the same shape."""
    return sub_layer.get_submodule("adapter")(output)


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
