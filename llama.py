"""Llama 2 (arXiv 2307.09288), top down: the model, a layer, its two sub-layers, the norm.

Written plainly; faster modules that compute the same are in `minllama/kernels/` and are put in with
`replace`. Shapes are those of a batch of `batch` sequences of `seqlen` tokens.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base_llama import LlamaPreTrainedModel, NoInitialWeights
from config import LlamaConfig, feed_forward_dim
from rope import apply_rotary_emb

if TYPE_CHECKING:
    from minllama.inference.cache import KVCache


class Llama(LlamaPreTrainedModel):
    """A decoder-only transformer.

    The assignment attends without a mask. Language models, these checkpoints among them, are
    trained with a causal one, which `config.causal` turns on.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.params = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(LlamaLayer(i, config) for i in range(config.n_layers))
        self.norm = RMSNorm(config.dim, eps=config.layer_norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.tok_embeddings.weight = self.output.weight

        self.apply(self._init_weights)
        # The assignment's choice of matrices; GPT-2 scales those that write to the residual stream.
        for name, parameter in self.named_parameters():
            if name.endswith(("w3.weight", "compute_output.weight")):
                nn.init.normal_(parameter, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layers))

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compute logits and hidden states.

        Args:
            tokens: ids `(batch, seqlen)`.
            targets: anything but None asks for the logits of all positions.

        Returns:
            logits `(batch, 1, vocab_size)` of the last position, or `(batch, seqlen, vocab_size)`;
            hidden states after the final norm, `(batch, seqlen, dim)`.
        """
        h = self.hidden_states(tokens)  # (batch, seqlen, dim)
        logits = self.output(h if targets is not None else h[:, [-1], :])
        return logits, h

    def hidden_states(
        self, tokens: Tensor, positions: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Compute the states after the final norm, `(batch, seqlen, dim)` or `(batch, n, dim)`.

        Args:
            tokens: ids `(batch, seqlen)`.
            positions: the only positions that are wanted, `(batch, n)`; None means all.
            cache: keys and values of the tokens before these; theirs are added to it.
        """
        h = self.dropout(self.tok_embeddings(tokens))  # (batch, seqlen, dim)
        if cache is not None:
            cache.begin(tokens.shape[1])
        *layers, last_layer = self.layers
        for layer in layers:
            h = layer(h, cache=cache)
        h = last_layer(h, positions, cache)  # (batch, seqlen or n, dim)
        if cache is not None:
            cache.end(tokens.shape[1])
        return self.norm(h)

    def next_logits(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Compute the logits of the next token, `(batch, vocab_size)`, with a cache as above."""
        return self.output(self.hidden_states(tokens, cache=cache)[:, -1])

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        *,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop_ids: Collection[int] | None = None,
    ) -> Tensor:
        """Continue each sequence, one token at a time; returns ids `(batch, seqlen + new)`.

        Args:
            idx: ids `(batch, seqlen)`.
            max_new_tokens: a causal model adds fewer if its context is full or all have ended.
            temperature: tokens are drawn from softmax(logits / temperature); 0 takes the likeliest.
            top_k, top_p, repetition_penalty: see `minllama/inference/sampling.py`.
            stop_ids: tokens that end a sequence of a causal model, by default BOS and EOS; EOS
                fills up the rest.
        """
        from minllama.inference.cache import KVCache
        from minllama.inference.sampling import Sampling

        sample = Sampling(temperature, top_k, top_p, repetition_penalty)
        max_len, cache = self.config.max_seq_len, None
        if self.config.causal:
            max_new_tokens = min(max_new_tokens, max_len - idx.shape[1])
            cache = KVCache(self, len(idx), idx.shape[1] + max_new_tokens)
        stop_ids = self.config.stop_ids if stop_ids is None else stop_ids
        stop = torch.tensor(list(stop_ids) if self.config.causal else [], device=idx.device)
        has_ended = torch.zeros_like(idx[:, :1], dtype=torch.bool)
        new = idx
        for _ in range(max_new_tokens):
            if cache is not None:  # it holds the keys and values of all earlier tokens
                logits = self.next_logits(new, cache)  # (batch, vocab_size)
            else:  # the newest token changes the states of all others, so all are computed again
                logits = self(idx[:, -max_len:])[0][:, -1]  # (batch, vocab_size)
            new = sample(logits, idx.tolist())  # (batch, 1)
            has_ended |= torch.isin(new, stop)
            if has_ended.all():
                break
            new = new.masked_fill(has_ended, self.config.eos_token_id)
            idx = torch.cat((idx, new), dim=1)
        return idx


class LlamaLayer(nn.Module):
    """A pre-norm transformer layer; each of its two sub-layers adds to the residual stream."""

    def __init__(self, layer_id: int, config: LlamaConfig):
        super().__init__()
        self.layer_id = layer_id
        self.n_heads, self.dim = config.n_heads, config.dim
        self.head_dim = self.dim // self.n_heads
        self.attention = Attention(config, layer_id)
        width, multiple_of = config.ffn_dim, config.multiple_of
        self.feed_forward = FeedForward(self.dim, width, multiple_of, config.dropout)
        self.attention_norm = RMSNorm(config.dim, eps=config.layer_norm_eps)
        self.ffn_norm = RMSNorm(config.dim, eps=config.layer_norm_eps)

    def forward(
        self, x: Tensor, positions: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """`(batch, seqlen, dim)` to the same shape, or to `(batch, n, dim)` for n positions."""
        h = x + self.attention(self.attention_norm(x), cache)
        if positions is not None:
            h = torch.take_along_dim(h, positions[..., None], dim=1)  # (batch, n, dim)
        return h + self.feed_forward(self.ffn_norm(h))


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with rotary position embedding."""

    def __init__(self, config: LlamaConfig, layer_id: int = 0):
        super().__init__()
        config.validate()
        self.layer_id = layer_id
        self.config = config
        self.n_local_heads = config.n_heads
        self.n_kv_heads = self.n_local_kv_heads = config.n_kv_heads or config.n_heads
        self.n_rep = self.n_local_heads // self.n_local_kv_heads
        self.head_dim = config.dim // self.n_local_heads
        kv_dim = self.n_local_kv_heads * self.head_dim
        self.compute_query = nn.Linear(config.dim, config.dim, bias=False)
        self.compute_key = nn.Linear(config.dim, kv_dim, bias=False)
        self.compute_value = nn.Linear(config.dim, kv_dim, bias=False)
        self.compute_output = nn.Linear(config.dim, config.dim, bias=False)
        self.max_seq_len, self.dropout = config.max_seq_len, config.dropout
        self.attn_dropout = nn.Dropout(config.attention_dropout)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """`(batch, seqlen, dim)` to the same shape."""
        # (batch, seqlen, n_local_heads or n_local_kv_heads, head_dim)
        query = self.compute_query(x).unflatten(-1, (self.n_local_heads, self.head_dim))
        key = self.compute_key(x).unflatten(-1, (self.n_local_kv_heads, self.head_dim))
        value = self.compute_value(x).unflatten(-1, (self.n_local_kv_heads, self.head_dim))
        start = 0 if cache is None else cache.start
        theta = self.config.rope_theta
        query, key = apply_rotary_emb(query, key, self.head_dim, self.max_seq_len, theta, start)
        # (batch, n_local_heads or n_local_kv_heads, seqlen, head_dim)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if cache is None:
            output = self.compute_query_key_value_scores(query, key, value)
        else:
            key, value = cache.update(self.layer_id, key, value)  # now of all tokens so far
            output = self.compute_query_key_value_scores(query.type_as(key), key, value, cache.mask)
        output = output.transpose(1, 2).flatten(2)  # (batch, seqlen, dim)
        return self.resid_dropout(self.compute_output(output))

    def compute_query_key_value_scores(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """softmax(query · keyᵀ / √head_dim) · value (arXiv 1706.03762, equation 1).

        Args:
            query: `(batch, n_local_heads, n, head_dim)`, of the last n of seqlen positions; so is
                what is returned.
            key, value: `(batch, n_local_heads or n_local_kv_heads, seqlen, head_dim)`.
            mask: True where a query sees a key, broadcastable to `(batch, n_local_heads, n,
                seqlen)`. None means the causal mask if `config.causal`, and no mask otherwise.
        """
        if key.shape[1] != query.shape[1]:  # each key and value head serves n_rep query heads
            key = key.repeat_interleave(self.n_rep, dim=1)
            value = value.repeat_interleave(self.n_rep, dim=1)
        scores = query / math.sqrt(self.head_dim) @ key.transpose(2, 3)
        n, seqlen = scores.shape[2:]  # (batch, n_local_heads, n, seqlen)
        if mask is None and self.config.causal:
            mask = torch.ones(n, seqlen, dtype=torch.bool, device=scores.device).tril(seqlen - n)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        weights = self.attn_dropout(F.softmax(scores.float(), dim=-1))
        return weights.type_as(value) @ value


class FeedForward(nn.Module):
    """The SwiGLU feed-forward layer (arXiv 2002.05202, equation 6)."""

    def __init__(self, dim: int, hidden_dim: int | None, multiple_of: int, dropout: float):
        super().__init__()
        if hidden_dim is None:
            hidden_dim = feed_forward_dim(dim, multiple_of)
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def SwiGLU(self, x: Tensor) -> Tensor:
        """silu(w1 x) * w3 x: `(…, dim)` to `(…, hidden_dim)`."""
        return F.silu(self.w1(x)) * self.w3(x)

    def forward(self, x: Tensor) -> Tensor:
        """`(…, dim)` to the same shape."""
        return self.dropout(self.w2(self.SwiGLU(x)))


class RMSNorm(nn.Module):
    """Root mean square norm (arXiv 1910.07467, equation 4), computed in float32."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def _norm(self, x: Tensor) -> Tensor:
        """x / √(mean(x²) + eps) over the last dimension, unscaled."""
        return x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        """`(…, dim)` to the same shape."""
        return self._norm(x.float()).type_as(x) * self.weight


def load_pretrained(
    checkpoint: str | Path,
    *,
    causal: bool | None = None,
    init_weights: bool = True,
    dtype: torch.dtype | None = torch.float32,
) -> Llama:
    """Build the Llama that a checkpoint describes and load its weights.

    Args:
        checkpoint: a path that `minllama.checkpoints.formats.load` reads; raises what it raises.
        causal: overrides the checkpoint's mask setting.
        init_weights: draw initial weights first, as the assignment does, so that what is drawn
            later (a new head, the order of the batches) is the same for the same seed.
        dtype: precision of the weights. None keeps the file's, and leaves the weights in the
            file, mapped into memory, until they are changed.
    """
    from minllama.checkpoints import formats
    from minllama.common.errors import FOR_LOADING, explain_out_of_memory

    config, tensors, _ = formats.load(checkpoint)
    if causal is not None:
        config.causal = causal
    with explain_out_of_memory(f"loading {checkpoint}", FOR_LOADING):
        with contextlib.nullcontext() if init_weights else NoInitialWeights():
            model = Llama(config)
        if dtype is not None:
            tensors = {name: tensor.to(dtype, copy=True) for name, tensor in tensors.items()}
        model.load_state_dict(tensors, assign=True)
    if config.tie_embeddings:
        model.tok_embeddings.weight = model.output.weight
    return model
