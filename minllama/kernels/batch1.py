"""Batch-1 decoding on a CPU, in as few operations as PyTorch needs.

A step is a few hundred operations, and most of them take longer to start than to compute. So the
token goes through the layers as a vector: without a batch, with one rotation of query, key and
value, one write to the cache, and the norm's factor as a number.
"""

import torch
import torch.nn.functional as F
from torch import nn

from llama import Llama
from minllama.inference.cache import KVCache
from rope import rotary_table


class Batch1Llama(nn.Module):
    """A causal model on a CPU with a faster step for a single row.

    Prompts and batches go through the model's own modules.

    Args:
        llama: a model that `prepare_for_decoding` has converted.
    """

    def __init__(self, llama: Llama):
        super().__init__()
        self.llama, self.config = llama, llama.config
        self.tok_embeddings, self.norm = llama.tok_embeddings, llama.norm
        self.output = llama.output
        config = self.config
        self.n_kv_heads = config.n_kv_heads or config.n_heads
        self.head_dim = config.dim // config.n_heads
        device = llama.tok_embeddings.weight.device
        self.rotations = rotary_table(self.head_dim, config.max_seq_len, config.rope_theta, device)
        # Values are not rotated, but a factor of 1 lets all heads be rotated at once.
        self.no_rotation = torch.ones(self.n_kv_heads, self.head_dim // 2, dtype=torch.complex64)
        # The modules' `forward`, because `nn.Module.__call__` takes a microsecond each time.
        self.layers = [
            (
                layer.get_parameter("attention_norm.weight"),
                layer.get_submodule("attention.query_key_value").forward,
                layer.get_submodule("attention.output").forward,
                layer.get_parameter("ffn_norm.weight"),
                layer.get_submodule("feed_forward.w1_w3").forward,
                layer.get_submodule("feed_forward.w2").forward,
            )
            for layer in llama.layers
        ]

    def hidden_states(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """Compute the hidden states as `Llama.hidden_states` does."""
        return self.llama.hidden_states(tokens, positions, cache)

    def next_logits(self, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Compute the next logits as `Llama.next_logits` does."""
        if tokens.numel() > 1:
            return self.llama.next_logits(tokens, cache)
        logits = self.step(int(tokens), cache.lengths[0], cache.data[:, :, 0])
        cache.end(1)
        return logits

    def step(self, token: int, position: int, keys_values: torch.Tensor) -> torch.Tensor:
        """Compute the logits of the token after the newest one, `(1, vocab_size)`.

        Args:
            token, position: id and position of the newest token.
            keys_values: `(n_layers, 2, n_kv_heads, max_len, head_dim)`; the token's are written.
        """
        eps = self.config.layer_norm_eps
        rotation = self.rotations[position].expand(self.config.n_heads + self.n_kv_heads, -1)
        rotation = torch.cat((rotation, self.no_rotation))  # of all heads: (n, head_dim / 2)
        seen = keys_values[:, :, :, : position + 1].unbind(0)
        x = self.tok_embeddings.weight[token].float()  # (dim,)
        for layer, seen_by_layer in zip(self.layers, seen, strict=True):
            attention_norm, query_key_value, output, ffn_norm, w1_w3, w2 = layer
            heads = query_key_value(norm(x, attention_norm, eps)).float()
            x = x + output(self.attend(heads, seen_by_layer, rotation))
            gate, up = w1_w3(norm(x, ffn_norm, eps)).chunk(2)
            x = x + w2(F.silu(gate) * up)
        return self.output(norm(x, self.norm.weight, eps)[None])

    def attend(
        self, heads: torch.Tensor, keys_values: torch.Tensor, rotation: torch.Tensor
    ) -> torch.Tensor:
        """Attention of the newest token to all so far.

        Args:
            heads: query, key and value of the token, `((n_heads + 2 · n_kv_heads) · head_dim,)`.
            keys_values: `(2, n_kv_heads, n_seen, head_dim)`, the last of which are written.
            rotation: factors of the pairs of each head, `(n_heads + 2 · n_kv_heads, head_dim / 2)`.

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


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of a vector `(dim,)`: x · weight / √(mean(x²) + eps)."""
    mean = float(torch.dot(x, x)) / len(x)
    return x * weight * (mean + eps) ** -0.5
