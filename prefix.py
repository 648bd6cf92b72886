"""Prefix tuning: learned keys and values before those of the sentence."""

import argparse

import torch
from torch import nn

from llama import Attention, Llama
from utils import InputError, adder, number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = adder(parser.add_argument_group("--tune prefix"))
    add("--prefix_length", type=number(int, 1), default=16, help="learned positions in every layer")


class PrefixAttention(Attention):
    """softmax(query · [P_k; key]ᵀ / √head_dim) · [P_v; value] (arXiv 2101.00190).

    This is the form of arXiv 2110.04366, equation 5. All tokens see the whole prefix, which has no
    position.

    Attributes:
        prefix_key, prefix_value: P_k and P_v, `(n_local_kv_heads, length, head_dim)`.
    """

    def __init__(self, attention: Attention, length: int):
        super().__init__(attention.config, attention.layer_id)
        for name, child in attention.named_children():
            setattr(self, name, child)
        shape = (self.n_local_kv_heads, length, self.head_dim)
        self.prefix_key = nn.Parameter(torch.zeros(shape))
        self.prefix_value = nn.Parameter(torch.zeros(shape))

    def compute_query_key_value_scores(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `Attention` does, with the prefix before keys and values."""
        if mask is not None:
            seen = mask.new_ones(*mask.shape[:-1], self.prefix_key.shape[1])
            mask = torch.cat((seen, mask), dim=-1)
        key, value = (
            torch.cat((prefix.type_as(x).expand(len(x), -1, -1, -1), x), dim=2)
            for prefix, x in ((self.prefix_key, key), (self.prefix_value, value))
        )
        return super().compute_query_key_value_scores(query, key, value, mask)


@torch.no_grad()
def add_prefix(llama: Llama, length: int) -> list[nn.Parameter]:
    """Put a prefix into every attention layer; return their parameters.

    They begin as the keys and values of random tokens, before rotation; random numbers train
    worse (arXiv 2101.00190, section 7.4).

    Raises:
        InputError: the prefix is longer than the context.
    """
    if length >= llama.config.max_seq_len:
        raise InputError(f"--prefix_length {length}: longer than the context")
    weight = llama.tok_embeddings.weight
    states = llama.tok_embeddings(torch.randint(len(weight), (1, length), device=weight.device))
    added = []
    llama.eval()
    for layer in llama.layers:
        attention = PrefixAttention(layer.attention, length).to(weight.device)
        _, key, value = attention.project(layer.attention_norm(states))
        for prefix, x in ((attention.prefix_key, key), (attention.prefix_value, value)):
            prefix.copy_(x.view(length, -1, attention.head_dim).transpose(0, 1))
            added.append(prefix)
        states = layer(states)
        layer.attention = attention
    return added
