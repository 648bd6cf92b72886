"""Generation over token ids: the key/value cache, sampling, and the two ways to decode."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from config import LlamaConfig
from utils import InputError

if TYPE_CHECKING:
    from llama import Llama

STOP_IDS = (1, 2)  # BOS and EOS of every Llama 2 tokenizer


class KVCache:
    """The keys and values of each row's tokens so far, for all layers.

    A row's tokens stand at positions 0, 1, … on the left, however long the other rows are. What
    lies behind a row's length is never attended to, and its next tokens overwrite it.

    Args:
        max_len: number of positions to make room for.

    Attributes:
        lengths: number of tokens of each row. Setting one lower forgets the row's last tokens.
        keys, values: per layer `(batch, n_kv_heads, max_len, head_dim)`.
        start: while a forward pass runs, the position of its first token, one number if all rows
            agree and otherwise `(batch,)`.
        stop: then also the number of positions that it reaches to.
        positions, mask: where rows differ, the positions of its tokens `(batch, n)` and which keys
            they see `(batch, 1, n, stop)`.
    """

    def __init__(
        self, config: LlamaConfig, batch_size: int, max_len: int, device: torch.device | str = "cpu"
    ):
        n_kv_heads = config.n_kv_heads or config.n_heads
        shape = (batch_size, n_kv_heads, max_len, config.dim // config.n_heads)
        self.lengths = [0] * batch_size
        self.keys = [torch.zeros(shape, device=device) for _ in range(config.n_layers)]
        self.values = [torch.zeros(shape, device=device) for _ in range(config.n_layers)]
        self.start: int | torch.Tensor = 0
        self.stop = 0
        self.positions: torch.Tensor | None = None
        self.mask: torch.Tensor | None = None

    def begin(self, n: int) -> None:
        """Prepare for a forward pass over each row's next n tokens."""
        self.stop = max(self.lengths) + n
        if min(self.lengths) == max(self.lengths):
            self.start, self.mask = self.lengths[0], None
        else:
            device = self.keys[0].device
            self.start = torch.tensor(self.lengths, device=device)
            self.positions = self.start[:, None] + torch.arange(n, device=device)
            seen = self.positions[:, :, None] >= torch.arange(self.stop, device=device)
            self.mask = seen[:, None]

    def update(
        self, layer_id: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a layer's keys and values of the pass's tokens.

        Args:
            key, value: `(batch, n_kv_heads, n, head_dim)`.

        Returns:
            those of all tokens so far, `(batch, n_kv_heads, stop, head_dim)`.
        """
        keys, values = self.keys[layer_id], self.values[layer_id]
        if torch.is_grad_enabled():  # autograd needs those that it has seen
            keys, values = keys.clone(), values.clone()
            self.keys[layer_id], self.values[layer_id] = keys, values
        if self.mask is None:
            keys[:, :, self.start : self.stop] = key
            values[:, :, self.start : self.stop] = value
        else:
            rows = torch.arange(len(key), device=key.device)[:, None]
            keys[rows, :, self.positions] = key.transpose(1, 2).type_as(keys)
            values[rows, :, self.positions] = value.transpose(1, 2).type_as(values)
        return keys[:, :, : self.stop], values[:, :, : self.stop]

    def end(self, n: int) -> None:
        """Count the n tokens of the pass in."""
        self.lengths = [length + n for length in self.lengths]

    def keep(self, rows: list[int]) -> None:
        """Forget all rows but these."""
        self.lengths = [self.lengths[row] for row in rows]
        self.keys = [key[rows] for key in self.keys]
        self.values = [value[rows] for value in self.values]


def last_column(tokens: torch.Tensor) -> torch.Tensor:
    """The position of each row's last token, padding or not: `(batch, seqlen)` to `(batch, 1)`."""
    return torch.full((len(tokens), 1), tokens.shape[1] - 1, device=tokens.device)


def sample(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Choose one token per row, `(batch, vocab_size)` to ids `(batch, 1)`.

    Args:
        temperature: 0 takes the likeliest; otherwise tokens are drawn from
            softmax(logits / temperature) with the global generator.
    """
    logits = logits.float()
    if temperature == 0.0:
        return logits.argmax(dim=-1, keepdim=True)
    probabilities = F.softmax(logits / temperature, dim=-1)
    return torch.multinomial(probabilities, num_samples=1)


@torch.inference_mode()
def decode(
    llama: Llama, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float = 1.0
) -> Iterator[list[int | None]]:
    """Continue prompts of any lengths together, with a causal model and a cache.

    All prompts are read in one pass; each step then computes one token per row. A row ends at BOS
    or EOS, which is not yielded, or with a warning where its `max_seq_len` tokens of context,
    prompt included, are full. From there on it costs nothing.

    Yields:
        at each step, every row's next id, None for rows that have ended.

    Raises:
        InputError: a prompt is empty or longer than the context.
    """
    max_seq_len = llama.config.max_seq_len
    lengths = [len(prompt) for prompt in prompts]
    if min(lengths) == 0:
        raise InputError("a prompt is empty; begin it with BOS")
    if max(lengths) > max_seq_len:
        raise InputError(
            f"a prompt of {max(lengths)} tokens does not fit the context of {max_seq_len}; "
            "shorten it"
        )
    if max_new_tokens == 0:
        return
    device = llama.tok_embeddings.weight.device
    tokens = [torch.tensor(prompt, device=device) for prompt in prompts]
    room = min(max(lengths) + max_new_tokens, max_seq_len)
    cache = KVCache(llama.config, len(prompts), room, device)
    last = torch.tensor(lengths, device=device)[:, None] - 1
    hidden = llama.hidden_states(pad_sequence(tokens, batch_first=True), last, cache=cache)
    cache.lengths = lengths  # forgets the padding

    going_on = list(range(len(prompts)))
    for step in range(max_new_tokens):
        fitting = [i for i, length in enumerate(cache.lengths) if length < max_seq_len]
        if len(fitting) < len(going_on):
            warnings.warn(
                f"the context of {max_seq_len} tokens is full; stopped after {step} new tokens",
                stacklevel=2,
            )
            going_on = [going_on[i] for i in fitting]
            cache.keep(fitting)
            hidden = hidden[fitting]
            if not going_on:
                return
        ids = sample(llama.output(hidden[:, 0]), temperature)
        new: list[int | None] = [None] * len(prompts)
        for row, token in zip(going_on, ids[:, 0].tolist(), strict=True):
            new[row] = None if token in STOP_IDS else token
        unended = [i for i, row in enumerate(going_on) if new[row] is not None]
        if not unended:
            return
        yield new
        if len(unended) < len(going_on):
            going_on = [going_on[i] for i in unended]
            cache.keep(unended)
            ids = ids[unended]
        if step + 1 < max_new_tokens:
            hidden = llama.hidden_states(ids, cache=cache)


@torch.inference_mode()
def decode_unmasked(
    llama: Llama, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float = 1.0
) -> Iterator[list[int]]:
    """Continue prompts of one length with a model that attends without a mask.

    There, every new token changes the states of all before it, so nothing can be cached: the whole
    context, cropped to its last `max_seq_len` tokens, goes through the model for every token.
    Decoding never stops early.

    Yields:
        at each step, every row's next id.
    """
    context = torch.tensor(prompts, device=llama.tok_embeddings.weight.device)
    for _ in range(max_new_tokens):
        context = context[:, -llama.config.max_seq_len :]
        hidden = llama.hidden_states(context, last_column(context))
        ids = sample(llama.output(hidden[:, 0]), temperature)
        yield ids[:, 0].tolist()
        context = torch.cat((context, ids), dim=1)
