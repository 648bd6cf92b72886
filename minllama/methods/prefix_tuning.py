"""Prefix tuning: learned keys and values before those of the sentence."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from base_llama import Wrapper, replace
from llama import Llama
from minllama.common.errors import InputError
from minllama.common.settings import flag
from minllama.methods.recipe import Method


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(Method):
    """A prefix in every attention layer trains; all else is frozen."""

    title = "--tune prefix (arXiv 2101.00190)"
    tune = "prefix"
    traits = frozenset({"added tensors", "frozen weights"})
    takes_bfloat16 = False  # the prefix begins as what they compute in float32
    former_names: ClassVar = {".attention.prefix_": ".attention.attend.prefix_"}

    prefix_length: int = flag(16, "learned positions in every layer", low=1)

    def adapt(self, model: nn.Module) -> None:
        """
        Raises:
            InputError: the prefix is longer than the context.
        """
        if self.prefix_length >= model.llama.config.max_seq_len:
            raise InputError(f"--prefix_length {self.prefix_length}: longer than the context")
        model.llama.requires_grad_(False)
        add_prefix(model.llama, self.prefix_length)


class PrefixedAttention(Wrapper):
    """softmax(query · [P_k; key]ᵀ / √head_dim) · [P_v; value] (arXiv 2101.00190).

    This is the form of arXiv 2110.04366, equation 5. All tokens see the whole prefix, which has no
    position.

    Args:
        wrapped: the `ScaledDotProductAttention`.
        key, value: what P_k and P_v begin as, `(n_kv_heads, length, head_dim)`.

    Attributes:
        prefix_key, prefix_value: P_k and P_v.
    """

    def __init__(self, wrapped: nn.Module, key: torch.Tensor, value: torch.Tensor):
        super().__init__(wrapped)
        self.prefix_key = nn.Parameter(key.clone())
        self.prefix_value = nn.Parameter(value.clone())

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Arguments and result are those of what it wraps."""
        if mask is not None:
            seen = mask.new_ones(*mask.shape[:-1], self.prefix_key.shape[1])
            mask = torch.cat((seen, mask), dim=-1)
        key, value = (
            torch.cat((prefix.type_as(x).expand(len(x), -1, -1, -1), x), dim=2)
            for prefix, x in ((self.prefix_key, key), (self.prefix_value, value))
        )
        return self.wrapped(query, key, value, mask)


@torch.no_grad()
def add_prefix(llama: Llama, length: int) -> None:
    """Put a prefix into every attention layer.

    They begin as the keys and values of random tokens, before rotation; random numbers train
    worse (arXiv 2101.00190, section 7.4).
    """
    weight = llama.tok_embeddings.weight
    states = llama.tok_embeddings(torch.randint(len(weight), (1, length), device=weight.device))
    llama.eval()
    for layer in llama.layers:
        attention, normed = layer.attention, layer.attention_norm(states)
        key, value = (
            compute(normed).view(length, -1, attention.head_dim).transpose(0, 1)
            for compute in (attention.compute_key, attention.compute_value)
        )
        states = layer(states)
        replace(attention, "attend", PrefixedAttention(attention.attend, key, value))
