"""Llama 2 (arXiv 2307.09288), top down: the model, a layer, its two sub-layers, the norm.

Shapes are those of a batch of `batch` rows of `seqlen` tokens. Nothing here knows of speed: what is
faster is put in from outside (`minllama/kernels/cpu.py`, `minllama/kernels/quantize.py`) and computes the same.
"""

import contextlib
import math
from collections.abc import Collection
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from base_llama import LlamaPreTrainedModel, NoInitialWeights
from config import LlamaConfig, feed_forward_dim
from minllama.checkpoints import formats
from minllama.checkpoints.layout import Checkpoint
from minllama.common.errors import FOR_LOADING, explain_out_of_memory
from minllama.inference.cache import KVCache
from minllama.inference.decoding import EOS_ID, STOP_IDS, decode, decode_unmasked
from minllama.inference.sampling import Sampling
from rope import apply_rotary_emb


class Llama(LlamaPreTrainedModel):
    """A decoder-only transformer.

    Its input embedding and output head share one matrix, unless `config.tie_embeddings` is False.
    `config.causal` says whether a position attends to those after it. The assignment attends
    without a mask; language models, these checkpoints among them, are trained with one.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.params = config
        self.vocab_size = config.vocab_size
        self.n_layers = config.n_layers

        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            LlamaLayer(layer_id, config) for layer_id in range(config.n_layers)
        )
        self.norm = RMSNorm(config.dim, eps=config.layer_norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.tok_embeddings.weight = self.output.weight

        self.apply(self._init_weights)
        # The assignment's choice of matrices; GPT-2 scales those that write to the residual stream.
        for name, parameter in self.named_parameters():
            if name.endswith(("w3.weight", "compute_output.weight")):
                nn.init.normal_(parameter, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layers))

    def forward(
        self, tokens: torch.Tensor, targets: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits and the hidden states.

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
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        cache: KVCache | None = None,
        offset: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The states after the final norm, without the logits.

        Args:
            tokens: ids `(batch, seqlen)`.
            positions: the only columns of each row that are wanted, `(batch, n)`. The last
                layer's feed-forward then computes no others.
            cache: what came before the tokens, for causal models; they are added to it.
            offset: added to the embeddings, `(batch, seqlen, dim)`.

        Returns:
            `(batch, seqlen, dim)`, or `(batch, n, dim)`.
        """
        h = self.tok_embeddings(tokens)  # (batch, seqlen, dim)
        if offset is not None:
            h = h + offset
        h = self.dropout(h)
        if cache is not None:
            if not self.config.causal:
                raise ValueError("without a causal mask, nothing can be cached")
            cache.begin(tokens.shape[1])
        *layers, last_layer = self.layers
        for layer in layers:
            h = layer(h, cache=cache)
        h = last_layer(h, positions, cache)  # (batch, seqlen or n, dim)
        if cache is not None:
            cache.end(tokens.shape[1])
        return self.norm(h)

    def next_logits(self, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """The logits of what follows, `(batch, vocab_size)`.

        Args:
            tokens: ids `(batch, n)`, added to the cache.
            cache: what came before.
        """
        return self.output(self.hidden_states(tokens, cache=cache)[:, -1])

    def generate(
        self,
        idx: torch.Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        *,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop_ids: Collection[int] = STOP_IDS,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Continue each row, as `decode` and `decode_unmasked` of `minllama/inference/decoding.py` say.

        Args:
            idx: ids `(batch, seqlen)`.
            max_new_tokens: number of tokens to add. With a causal model fewer come if all rows
                end or the context is full; rows that end before others are filled with EOS.
            temperature: 0 takes the likeliest token; otherwise tokens are drawn from
                softmax(logits / temperature).
            top_k, top_p, repetition_penalty, generator: as `Sampling` has them.
            stop_ids: what ends a row of a causal model.

        Returns:
            prompt and continuation, ids `(batch, seqlen + new)`.
        """
        sampling = Sampling(temperature, top_k, top_p, repetition_penalty, generator)
        arguments = (self, idx.tolist(), max_new_tokens, sampling)
        is_causal = self.config.causal
        for ids in decode(*arguments, stop_ids) if is_causal else decode_unmasked(*arguments):
            column = [EOS_ID if token is None else token for token in ids]
            idx = torch.cat((idx, idx.new_tensor(column)[:, None]), dim=1)
        return idx


class LlamaLayer(nn.Module):
    """One pre-norm transformer layer; each sub-layer adds to the residual stream."""

    def __init__(self, layer_id: int, config: LlamaConfig):
        super().__init__()
        self.layer_id = layer_id
        self.attention = Attention(config, layer_id)
        self.feed_forward = FeedForward(
            dim=config.dim,
            hidden_dim=config.ffn_dim,
            multiple_of=config.multiple_of,
            dropout=config.dropout,
        )
        self.attention_norm = RMSNorm(config.dim, eps=config.layer_norm_eps)
        self.ffn_norm = RMSNorm(config.dim, eps=config.layer_norm_eps)

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """`(batch, seqlen, dim)` to the same shape, or to `(batch, n, dim)` for n positions."""
        h = x + self.attention(self.attention_norm(x), cache)
        if positions is not None:
            h = select(h, positions)  # (batch, n, dim)
        return h + self.feed_forward(self.ffn_norm(h))


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with rotary position embedding.

    Args:
        layer_id: which of a cache's layers is this one's.

    Raises:
        ValueError: there is no attention of this configuration.
    """

    def __init__(self, config: LlamaConfig, layer_id: int = 0):
        super().__init__()
        self.layer_id = layer_id
        config.check()
        self.config = config
        self.n_local_heads = config.n_heads
        self.n_local_kv_heads = config.n_kv_heads or config.n_heads
        self.n_rep = self.n_local_heads // self.n_local_kv_heads
        self.head_dim = config.dim // self.n_local_heads
        kv_dim = self.n_local_kv_heads * self.head_dim
        self.compute_query = nn.Linear(config.dim, config.dim, bias=False)
        self.compute_key = nn.Linear(config.dim, kv_dim, bias=False)
        self.compute_value = nn.Linear(config.dim, kv_dim, bias=False)
        self.compute_output = nn.Linear(config.dim, config.dim, bias=False)
        self.attend = ScaledDotProductAttention(config)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """`(batch, seqlen, dim)` to the same shape."""
        # (batch, seqlen, n_local_heads or n_local_kv_heads, head_dim)
        query = self.compute_query(x).unflatten(-1, (self.n_local_heads, self.head_dim))
        key = self.compute_key(x).unflatten(-1, (self.n_local_kv_heads, self.head_dim))
        value = self.compute_value(x).unflatten(-1, (self.n_local_kv_heads, self.head_dim))
        query, key = apply_rotary_emb(
            query,
            key,
            self.head_dim,
            self.config.max_seq_len,
            self.config.rope_theta,
            start=0 if cache is None else cache.start,
        )
        # (batch, heads, seqlen, head_dim)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if cache is None:
            output = self.compute_query_key_value_scores(query, key, value)
        else:
            key, value = cache.update(self.layer_id, key, value)  # those before them in front
            output = self.attend(query.type_as(key), key, value, cache.mask)
        output = output.transpose(1, 2).flatten(2)  # (batch, seqlen, dim)
        return self.resid_dropout(self.compute_output(output))

    def compute_query_key_value_scores(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """What `ScaledDotProductAttention` computes; the assignment has it under this name."""
        return self.attend(query, key, value)


class ScaledDotProductAttention(nn.Module):
    """softmax(query · keyᵀ / √head_dim) · value (arXiv 1706.03762, equation 1).

    Args:
        config: says whether there is a causal mask, and how many weights are dropped in training.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            query: `(batch, n_local_heads, n, head_dim)`, of the last n of seqlen positions.
            key, value: `(batch, n_local_heads, seqlen, head_dim)`, or with `n_local_kv_heads`, each
                then serving several queries.
            mask: which keys each query sees, broadcastable to `(batch, n_local_heads, n, seqlen)`;
                None is as the configuration says, all of them or those up to its own position.

        Returns:
            `(batch, n_local_heads, n, head_dim)`.
        """
        n, seqlen = query.shape[2], key.shape[2]
        if mask is None and self.config.causal and 1 < n < seqlen:
            mask = torch.ones(n, seqlen, dtype=torch.bool, device=query.device)
            mask = mask.tril(diagonal=seqlen - n)
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.config.attention_dropout if self.training else 0.0,
            is_causal=self.config.causal and mask is None and n == seqlen,
            enable_gqa=key.shape[1] != query.shape[1],
        )


class FeedForward(nn.Module):
    """The SwiGLU feed-forward layer (arXiv 2002.05202, equation 6).

    Args:
        dim: width of input and output.
        hidden_dim: inner width; None takes 2/3 · 4 · dim, rounded up to a multiple of
            `multiple_of`.
    """

    def __init__(self, dim: int, hidden_dim: int | None, multiple_of: int, dropout: float):
        super().__init__()
        if hidden_dim is None:
            hidden_dim = feed_forward_dim(dim, multiple_of)
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def SwiGLU(self, x: torch.Tensor) -> torch.Tensor:
        """silu(w1 x) * w3 x: `(…, dim)` to `(…, hidden_dim)`."""
        return F.silu(self.w1(x)) * self.w3(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(…, dim)` to the same shape."""
        return self.dropout(self.w2(self.SwiGLU(x)))


class RMSNorm(nn.Module):
    """Root mean square norm (arXiv 1910.07467, equation 4), computed in float32."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        """x / √(mean(x²) + eps) over the last dimension, unscaled."""
        return torch.rms_norm(x, x.shape[-1:], None, self.eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(…, dim)` to the same shape."""
        return self._norm(x.float()).type_as(x) * self.weight


def select(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Of each row the given positions: `(batch, seqlen, …)` and `(batch, n)` to `(batch, n, …)`."""
    rows = torch.arange(len(x), device=x.device)[:, None]
    return x[rows, positions]


def load_pretrained(
    checkpoint: str | Path | Checkpoint,
    *,
    causal: bool | None = None,
    init_weights: bool = True,
    dtype: torch.dtype | None = torch.float32,
) -> Llama:
    """Build the Llama that a checkpoint describes and load its weights.

    Args:
        checkpoint: a file like `stories42M.pt`, a folder of Hugging Face or of Meta, or a `.bin` of
            llama2.c, for each of which `checkpoints/` has a file; or what was read from one.
        causal: overrides what the checkpoint says.
        init_weights: draw the initial weights before they are replaced, as the assignment does, so
            that what is drawn afterwards (a new head, the order of the batches) is the same for the
            same seed. False draws nothing, and takes less time and memory.
        dtype: of the weights. None keeps the file's and leaves the weights in it, mapped into
            memory, until they are changed.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: it is no such checkpoint; the message names the tensors that are missing,
            unexpected or of another shape.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = formats.load(checkpoint)
    config, tensors, source = checkpoint
    if causal is not None:
        config.causal = causal
    with explain_out_of_memory(f"loading {source}", FOR_LOADING):
        with contextlib.nullcontext() if init_weights else NoInitialWeights():
            model = Llama(config)
        if dtype is not None:
            tensors = {name: tensor.to(dtype, copy=True) for name, tensor in tensors.items()}
        model.load_state_dict(tensors, assign=True)
    if config.tie_embeddings:
        model.tok_embeddings.weight = model.output.weight
    return model
