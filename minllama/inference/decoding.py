"""Decoding of token ids: with a cache for causal models, from whole contexts for all others."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn.utils.rnn import pad_sequence

from config import LlamaConfig
from llama import BOS_ID, EOS_ID, Llama
from minllama.common.errors import InputError
from minllama.inference.cache import KVCache
from minllama.inference.sampling import Sampling

if TYPE_CHECKING:
    from minllama.kernels.batch1 import Batch1Llama

STOP_IDS = (BOS_ID, EOS_ID)
StopRule = Callable[[int, list[int]], bool]  # whether a row ends, by its index and its ids


def never_stop(row: int, ids: list[int]) -> bool:
    """End no row."""
    return False


@torch.inference_mode()
def decode(
    llama: Llama | Batch1Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: Collection[int] = STOP_IDS,
    should_stop: StopRule = never_stop,
) -> Iterator[list[int | None]]:
    """Continue prompts of any lengths in one batch, with a causal model and a cache.

    A row ends before a stop id, after a token with which `should_stop` is true, or with a warning
    when its context is full. Only the active rows, which have not ended, are computed.

    Yields:
        at each step the next id of every row, None for rows that have ended.

    Raises:
        InputError: a prompt is empty or longer than the context.
    """
    rows = copy_prompts(prompts, llama.config)
    active = drop_full(range(len(rows)), rows, llama.config, 0) if max_new_tokens > 0 else []
    if not active:
        return
    logits, cache = prefill(llama, [rows[row] for row in active], max_new_tokens)
    for n_new in range(1, max_new_tokens + 1):
        ids = sample(logits, rows, active, sampling)  # (n_active, 1)
        remaining = [row for row in active if rows[row][-1] not in stop_ids]
        if remaining:
            yield newest(rows, remaining)
        if n_new == max_new_tokens:
            return
        remaining = [row for row in remaining if not should_stop(row, rows[row])]
        remaining = drop_full(remaining, rows, llama.config, n_new)
        if not remaining:
            return
        if remaining != active:
            kept = [active.index(row) for row in remaining]
            cache.keep(kept)
            ids, active = ids[kept], remaining
        logits = llama.next_logits(ids, cache)  # (n_active, vocab_size)


@torch.inference_mode()
def decode_unmasked(
    llama: Llama | Batch1Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    should_stop: StopRule = never_stop,
) -> Iterator[list[int | None]]:
    """Continue prompts with a model that attends without a mask.

    There every new token changes the states of all before it, so nothing can be cached: the last
    `max_seq_len` tokens go through the model for each new one. Prompts of one length are one batch;
    others are continued one after the other, because padding would be attended to.

    Yields:
        as `decode`.
    """
    rows = [list(prompt) for prompt in prompts]
    batches = [list(range(len(rows)))]
    if len({len(row) for row in rows}) > 1:
        batches = [[row] for row in range(len(rows))]
    for batch in batches:
        active = batch
        context = torch.tensor(
            [rows[row] for row in batch], device=llama.tok_embeddings.weight.device
        )
        for _ in range(max_new_tokens):
            context = context[:, -llama.config.max_seq_len :]
            last = context.new_full((len(batch), 1), context.shape[1] - 1)
            hidden = llama.hidden_states(context, last)  # (batch, 1, dim)
            ids = sample(llama.output(hidden[:, 0]), rows, batch, sampling)
            yield newest(rows, active)
            active = [row for row in active if not should_stop(row, rows[row])]
            if not active:
                break
            context = torch.cat((context, ids), dim=1)


def copy_prompts(prompts: Sequence[Sequence[int]], config: LlamaConfig) -> list[list[int]]:
    """Copy prompts into rows that can grow.

    Raises:
        InputError: a prompt is empty or longer than the context.
    """
    lengths = [len(prompt) for prompt in prompts]
    if min(lengths) == 0:
        raise InputError("a prompt is empty; begin it with BOS")
    if max(lengths) > config.max_seq_len:
        raise InputError(
            f"a prompt of {max(lengths)} tokens does not fit the context of "
            f"{config.max_seq_len}; shorten it"
        )
    return [list(prompt) for prompt in prompts]


def prefill(
    llama: Llama | Batch1Llama, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> tuple[torch.Tensor, KVCache]:
    """Read prompts in one padded pass.

    Returns:
        the logits of the next tokens, `(batch, vocab_size)`, and a cache of the prompts.
    """
    device = llama.tok_embeddings.weight.device
    lengths = [len(prompt) for prompt in prompts]
    max_len = min(max(lengths) + max_new_tokens, llama.config.max_seq_len)
    cache = KVCache(llama.config, len(prompts), max_len, device)
    tokens = [torch.tensor(prompt, device=device) for prompt in prompts]
    last = torch.tensor(lengths, device=device)[:, None] - 1
    hidden = llama.hidden_states(pad_sequence(tokens, batch_first=True), last, cache=cache)
    cache.lengths = lengths  # forget the padding
    return llama.output(hidden[:, 0]), cache


def drop_full(
    active: Sequence[int], rows: Sequence[Sequence[int]], config: LlamaConfig, n_new: int
) -> list[int]:
    """Keep the active rows whose context has room for a token; warn if one has not.

    Args:
        n_new: number of tokens generated so far.
    """
    remaining = [row for row in active if len(rows[row]) < config.max_seq_len]
    if len(remaining) < len(active):
        warnings.warn(
            f"the context of {config.max_seq_len} tokens is full; stopped after {n_new} new tokens",
            stacklevel=3,
        )
    return remaining


def sample(
    logits: torch.Tensor, rows: Sequence[list[int]], active: Sequence[int], sampling: Sampling
) -> torch.Tensor:
    """Draw the next id of each active row and append it to the row.

    Args:
        logits: `(n_active, vocab_size)`.

    Returns:
        the ids, `(n_active, 1)`.
    """
    ids = sampling(logits, [rows[row] for row in active])
    for row, token in zip(active, ids[:, 0].tolist(), strict=True):
        rows[row].append(token)
    return ids


def newest(rows: Sequence[Sequence[int]], active: Sequence[int]) -> list[int | None]:
    """The last id of each active row, None for the others."""
    return [ids[-1] if row in active else None for row, ids in enumerate(rows)]
