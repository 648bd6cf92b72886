"""Prefix tuning: learned keys and values before those of the sentence."""

from dataclasses import dataclass

import torch
from torch import nn

from base_llama import replace
from classifier import SentenceClassifier
from llama import Attention, Llama, LlamaLayer
from minllama.common.errors import InputError
from minllama.common.settings import flag
from minllama.kernels.cpu import FastAttention
from minllama.methods.base import Method


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(Method):
    """Train a prefix in every attention layer, and freeze the rest."""

    title = "--tune prefix (arXiv 2101.00190)"
    tune = "prefix"
    traits = frozenset({"added tensors", "frozen weights"})

    prefix_length: int = flag(16, "learned positions in every layer", low=1)

    def adapt(self, model: SentenceClassifier) -> None:
        """Add a trainable prefix to every attention layer, and freeze the rest.

        Raises:
            InputError: the prefix is longer than the context.
        """
        if self.prefix_length >= model.llama.config.max_seq_len:
            raise InputError(f"--prefix_length {self.prefix_length}: longer than the context")
        model.llama.requires_grad_(False)
        add_prefix(model.llama, self.prefix_length)


class PrefixAttention(FastAttention):
    """softmax(query · [P_k; key]ᵀ / √head_dim) · [P_v; value] (arXiv 2110.04366, equation 5).

    All tokens see the whole prefix, which has no position.

    Args:
        attention: the layer whose parameters this one shares.
        prefix_key, prefix_value: initial values of P_k and P_v, `(n_kv_heads, length, head_dim)`.
    """

    def __init__(self, attention: Attention, prefix_key: torch.Tensor, prefix_value: torch.Tensor):
        super().__init__(attention)
        self.prefix_key = nn.Parameter(prefix_key.clone())
        self.prefix_value = nn.Parameter(prefix_value.clone())

    def compute_query_key_value_scores(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Arguments and result are those of `Attention`."""
        prefix_key = self.prefix_key.type_as(key).expand(len(key), -1, -1, -1)
        prefix_value = self.prefix_value.type_as(value).expand(len(value), -1, -1, -1)
        key = torch.cat((prefix_key, key), dim=2)  # (batch, n_kv_heads, length + seqlen, head_dim)
        value = torch.cat((prefix_value, value), dim=2)
        if mask is not None:
            sees_prefix = mask.new_ones(*mask.shape[:-1], prefix_key.shape[2])
            mask = torch.cat((sees_prefix, mask), dim=-1)
        return super().compute_query_key_value_scores(query, key, value, mask)


@torch.no_grad()
def add_prefix(llama: Llama, length: int) -> None:
    """Replace every attention layer by a `PrefixAttention`.

    A prefix begins as the keys and values of random tokens, before rotation, because random numbers
    train worse (arXiv 2101.00190, section 7.4).
    """
    weight = llama.tok_embeddings.weight
    states = llama.tok_embeddings(torch.randint(len(weight), (1, length), device=weight.device))
    llama.eval()
    for layer in llama.layers:
        assert isinstance(layer, LlamaLayer)
        attention, normed = layer.attention, layer.attention_norm(states)
        shape = (length, attention.n_local_kv_heads, attention.head_dim)
        key = attention.compute_key(normed).view(shape).transpose(0, 1)
        value = attention.compute_value(normed).view(shape).transpose(0, 1)
        states = layer(states)
        replace(layer, "attention", PrefixAttention(attention, key, value))
