"""Llama 2 (arXiv 2307.09288), top down: the model, a layer, its two sub-layers, the norm."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from base_llama import LlamaPreTrainedModel, checked_state_dict, read_checkpoint
from config import LlamaConfig
from decoding import STOP_IDS, KVCache, decode, decode_unmasked
from linear import Linear
from rope import apply_rotary_emb
from utils import InputError

EOS_ID = STOP_IDS[1]
MAX_PLAIN = 512  # tokens up to which attention by plain products is the faster one in bfloat16


class Llama(LlamaPreTrainedModel):
    """A decoder-only transformer whose input embedding and output head share one matrix.

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
        self.output = Linear(config.dim, config.vocab_size)
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
        h = self.hidden_states(tokens)
        logits = self.output(h if targets is not None else h[:, [-1], :])
        return logits, h

    def hidden_states(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """The states after the final norm, without the logits.

        Args:
            tokens: ids `(batch, seqlen)`.
            positions: the only columns of each row that are wanted, `(batch, n)`. The last
                layer's feed-forward then computes no others.
            cache: what came before the tokens, for causal models; they are added to it.

        Returns:
            `(batch, seqlen, dim)`, or `(batch, n, dim)`.
        """
        # What is None is not passed on: a replaced layer may have the assignment's signature.
        options = {}
        if cache is not None:
            if not self.config.causal:
                raise ValueError("without a causal mask, nothing can be cached")
            cache.begin(tokens.shape[1])
            options["cache"] = cache
        h = self.tok_embeddings(tokens)
        if self.training:
            h = self.dropout(h)
        *layers, last_layer = self.layers
        for layer in layers:
            h = layer(h, **options)
        if positions is not None:
            options["positions"] = positions
        h = last_layer(h, **options)
        if cache is not None:
            cache.end(tokens.shape[1])
        return self.norm(h)

    def generate(
        self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0
    ) -> torch.Tensor:
        """Continue each row, as `decoding.decode` and `decoding.decode_unmasked` say.

        Args:
            idx: ids `(batch, seqlen)`.
            max_new_tokens: number of tokens to add. With a causal model fewer come if all rows
                end or the context is full; rows that end before others are filled with EOS.
            temperature: 0 takes the likeliest token; otherwise tokens are drawn from
                softmax(logits / temperature) with the global generator.

        Returns:
            prompt and continuation, ids `(batch, seqlen + new)`.
        """
        steps = decode if self.config.causal else decode_unmasked
        for ids in steps(self, idx.tolist(), max_new_tokens, temperature):
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
            hidden_dim=config.hidden_dim,
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
        normed = self.attention_norm(x)
        h = x + (self.attention(normed) if cache is None else self.attention(normed, cache))
        if positions is not None:
            h = select(h, positions)
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
        self.compute_query = Linear(config.dim, config.dim)
        self.compute_key = Linear(config.dim, kv_dim)
        self.compute_value = Linear(config.dim, kv_dim)
        self.compute_output = Linear(config.dim, config.dim)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """`(batch, seqlen, dim)` to the same shape."""
        batch_size, seqlen, _ = x.shape
        query, key, value = self.project(x)
        query = query.view(batch_size, seqlen, self.n_local_heads, self.head_dim)
        key = key.view(batch_size, seqlen, self.n_local_kv_heads, self.head_dim)
        value = value.view(batch_size, seqlen, self.n_local_kv_heads, self.head_dim)
        start = {} if cache is None else {"start": cache.start}
        query, key = apply_rotary_emb(query, key, self.head_dim, self.config.max_seq_len, **start)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if cache is not None:
            key, value = cache.update(self.layer_id, key, value)
            query = query.type_as(key)
        if cache is None or cache.mask is None:
            output = self.compute_query_key_value_scores(query, key, value)
        else:
            output = self.compute_query_key_value_scores(query, key, value, cache.mask)
        output = self.compute_output(output.transpose(1, 2).flatten(2))
        return self.resid_dropout(output) if self.training else output

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value of all heads, `(batch, seqlen, n · head_dim)` each."""
        return self.compute_query(x), self.compute_key(x), self.compute_value(x)

    def compute_query_key_value_scores(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """softmax(query · keyᵀ / √head_dim) · value (arXiv 1706.03762, equation 1).

        Args:
            query: `(batch, n_local_heads, n, head_dim)`, of the last n of seqlen positions.
            key, value: `(batch, n_local_heads, seqlen, head_dim)`, or with `n_local_kv_heads`, each
                then serving `n_rep` queries.
            mask: which keys each query sees, broadcastable to `(batch, n_local_heads, n, seqlen)`;
                None is as the configuration says, all of them or those up to its own position.

        Returns:
            `(batch, n_local_heads, n, head_dim)`.
        """
        n, seqlen = query.shape[2], key.shape[2]
        dropout_p = self.config.attention_dropout if self.training else 0.0
        short = mask is None and 1 < n <= seqlen <= MAX_PLAIN
        if short and query.dtype == torch.bfloat16 and query.device.type == "cpu":
            return plain_attention(query, key, value, self.config.causal, dropout_p)
        if mask is None and self.config.causal and 1 < n < seqlen:
            mask = torch.ones(n, seqlen, dtype=torch.bool, device=query.device)
            mask = mask.tril(diagonal=seqlen - n)
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=dropout_p,
            is_causal=self.config.causal and mask is None and n == seqlen,
            enable_gqa=key.shape[1] != query.shape[1],
        )


def plain_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, dropout_p: float
) -> torch.Tensor:
    """`F.scaled_dot_product_attention` of short rows, its softmax in float32.

    For short rows in bfloat16 PyTorch's CPU kernel takes several times as long, above all backward.

    Args:
        query: `(batch, n_heads, n, head_dim)`, of the last n of seqlen positions.
        key, value: `(batch, n_kv_heads, seqlen, head_dim)`.

    Returns:
        as the query.
    """
    (n, head_dim), seqlen = query.shape[2:], key.shape[2]
    query = query / math.sqrt(head_dim)
    query = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # all that share a key together
    scores = (query @ key.transpose(-1, -2)).unflatten(2, (-1, n)).float()
    if causal:
        scores += scores.new_full((n, seqlen), -math.inf).triu(diagonal=1 + seqlen - n)
    weights = F.dropout(scores.softmax(dim=-1), dropout_p).type_as(value)
    return (weights.flatten(2, 3) @ value).unflatten(2, (-1, n)).flatten(1, 2)


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
            hidden_dim = math.ceil(int(2 * 4 * dim / 3) / multiple_of) * multiple_of
        self.w1 = Linear(dim, hidden_dim)
        self.w2 = Linear(hidden_dim, dim)
        self.w3 = Linear(dim, hidden_dim)
        self.dropout = nn.Dropout(dropout)

    def SwiGLU(self, x: torch.Tensor) -> torch.Tensor:
        """silu(w1 x) * w3 x: `(…, dim)` to `(…, hidden_dim)`."""
        gate, up = self.project(x)
        return F.silu(gate) * up

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """w1 x and w3 x."""
        return self.w1(x), self.w3(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(…, dim)` to the same shape."""
        output = self.w2(self.SwiGLU(x))
        return self.dropout(output) if self.training else output


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
        if x.dtype == self.weight.dtype == torch.float32:  # in one operation
            return torch.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return self._norm(x.float()).type_as(x) * self.weight


def select(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Of each row the given positions: `(batch, seqlen, …)` and `(batch, n)` to `(batch, n, …)`."""
    rows = torch.arange(len(x), device=x.device)[:, None]
    return x[rows, positions]


def load_pretrained(checkpoint: str | Path, *, causal: bool | None = None) -> Llama:
    """Build the Llama that a checkpoint describes and load its weights.

    The initial weights are drawn before they are replaced, as in the assignment, so that what is
    drawn afterwards (a new head, the order of the batches) is the same for the same seed.

    Args:
        checkpoint: a file like `stories42M.pt`: a dict with the tensors as `model` and the
            arguments of `LlamaConfig` as `model_args`. llama2.c's tensor names are understood.
        causal: overrides the checkpoint's `model_args["causal"]`.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: it is no such checkpoint; the message names the tensors that are missing,
            unexpected or of another shape.
    """
    saved = read_checkpoint(checkpoint)
    for key in ("model_args", "model"):
        if not isinstance(saved.get(key), dict):
            raise InputError(f"{checkpoint}: no dict {key!r} in it, so it is no Llama checkpoint")
    try:
        config = LlamaConfig(**saved["model_args"])
        config.check()
    except (ValueError, TypeError) as error:
        raise InputError(f"{checkpoint}: model_args describe no Llama: {error}") from error
    if causal is not None:
        config.causal = causal
    model = Llama(config)
    model.load_state_dict(checked_state_dict(saved["model"], model.state_dict(), checkpoint))
    return model
