"""The step of decoding one row on a CPU, in as few operations as PyTorch needs.

A step is a few hundred operations, and most of them take longer to start than to compute. So one
token is taken through the layers as a vector: without a batch, with one rotation for query, key and
value, one write to the cache, and the norm's factor as a number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from minllama.inference.cache import KVCache
from minllama.kernels.quantize import PackedLlama, PackedNorm, prepare_for_decoding
from rope import rotary_table

if TYPE_CHECKING:
    from llama import Llama


class Batch1Llama(PackedLlama):
    """A causal model on a CPU, packed, with a shorter step for one row.

    Prompts and several rows go through the packed modules.

    Args:
        llama: is packed in place.
        dtype: of the weights, as for `prepare_for_decoding`.
    """

    def __init__(self, llama: Llama, dtype: str):
        super().__init__(prepare_for_decoding(llama, dtype))
        config = self.config
        self.n_kv_heads = config.n_kv_heads or config.n_heads
        self.head_dim = config.dim // config.n_heads
        self.rotations = rotary_table(
            self.head_dim, config.max_seq_len, config.rope_theta, llama.tok_embeddings.weight.device
        )
        self.no_rotation = torch.ones(self.n_kv_heads, self.head_dim // 2, dtype=torch.complex64)

    def next_logits(self, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """As `Llama.next_logits`."""
        if tokens.numel() > 1:
            return super().next_logits(tokens, cache)
        position = cache.lengths[0]
        rotation = self.rotations[position].expand(self.config.n_heads + self.n_kv_heads, -1)
        rotation = torch.cat((rotation, self.no_rotation))  # of all heads: (n, head_dim / 2)
        seen = cache.data[:, :, 0, :, : position + 1]
        x = self.llama.tok_embeddings.weight[tokens[0, 0]].float()  # (dim,)
        for layer, keys_values in zip(self.llama.layers, seen.unbind(0), strict=True):
            attention, feed_forward = layer.attention, layer.feed_forward
            heads = attention.query_key_value(norm(layer.attention_norm, x)).float()
            attended = self._attend(heads, keys_values, rotation)
            x = x + attention.output(attended)
            gate, up = feed_forward.w1_w3(norm(layer.ffn_norm, x)).chunk(2)
            x = x + feed_forward.w2(F.silu(gate) * up)
        cache.end(1)
        return self.llama.output(norm(self.llama.norm, x)[None])

    def _attend(
        self, heads: torch.Tensor, keys_values: torch.Tensor, rotation: torch.Tensor
    ) -> torch.Tensor:
        """Attention of the newest token to all so far.

        Args:
            heads: query, key and value of the token, `((n_heads + 2 · n_kv_heads) · head_dim,)`.
            keys_values: `(2, n_kv_heads, n_seen, head_dim)`, whose last are written.
            rotation: of every head, `(n_heads + 2 · n_kv_heads, head_dim / 2)`.

        Returns:
            `(dim,)`.
        """
        pairs = torch.view_as_complex(heads.view(-1, self.head_dim // 2, 2))
        rotated = torch.view_as_real(pairs * rotation).view(-1, self.head_dim)
        n_heads = self.config.n_heads
        keys_values[:, :, -1] = rotated[n_heads:].view(2, self.n_kv_heads, self.head_dim)
        keys, values = keys_values[:, None]  # with a batch: (1, n_kv_heads, n_seen, head_dim)
        output = F.scaled_dot_product_attention(
            rotated[None, :n_heads, None], keys, values, enable_gqa=n_heads != self.n_kv_heads
        )
        return output.view(-1)


def norm(module: PackedNorm, x: torch.Tensor) -> torch.Tensor:
    """RMSNorm of a vector `(dim,)`: x · weight / √(mean(x²) + eps)."""
    mean = float(torch.dot(x, x)) / len(x)
    return x * module.weight * (mean + module.eps) ** -0.5
