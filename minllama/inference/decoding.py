"""Decoding of token ids: with a cache for causal models, from whole contexts for all others."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn.utils.rnn import pad_sequence

from config import LlamaConfig
from llama import Llama
from minllama.common.errors import InputError
from minllama.inference.cache import KVCache
from minllama.inference.sampling import Sampling

if TYPE_CHECKING:
    from minllama.kernels.batch1 import Batch1Llama

StopRule = Callable[[int, list[int]], bool]  # whether a row ends, by its index and its ids


@torch.inference_mode()
def decode(
    llama: Llama | Batch1Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: Collection[int] | None = None,
    should_stop: StopRule = lambda row, ids: False,
) -> Iterator[list[int | None]]:
    """Continue prompts of any lengths together. Only active rows, which have not ended, run.

    A row ends before a stop id (None means BOS and EOS), after a token with which `should_stop` is
    true, or with a warning when the context of a causal model is full.

    Yields:
        at each step the next id of every row, None for rows that have ended.
    """
    config, rows = llama.config, [list(prompt) for prompt in prompts]
    stop_ids = config.stop_ids if stop_ids is None else stop_ids
    check_prompts(rows, config)
    active, cache = list(range(len(rows))), None
    in_cache, ids = active, torch.empty(0)  # the rows in the cache and their newest ids, (n, 1)
    for n_new in range(max_new_tokens):
        active = drop_full(active, rows, config, n_new)
        if not active:
            return
        if not config.causal:
            logits = read_contexts(llama, [rows[row] for row in active])  # (n_active, vocab_size)
        elif cache is None:
            logits, cache = prefill(llama, [rows[row] for row in active], max_new_tokens)
        else:
            if active != in_cache:
                kept = [in_cache.index(row) for row in active]
                cache.keep(kept)
                ids = ids[kept]
            logits = llama.next_logits(ids, cache)
        in_cache = active
        ids = sample(logits, rows, active, sampling)  # (n_active, 1)
        active = [row for row in active if rows[row][-1] not in stop_ids]
        if active:
            yield [rows[row][-1] if row in active else None for row in range(len(rows))]
        active = [row for row in active if not should_stop(row, rows[row])]


def check_prompts(prompts: Sequence[Sequence[int]], config: LlamaConfig) -> None:
    """Check that prompts can be continued.

    Raises:
        InputError: a prompt is empty or, for a causal model, longer than the context.
    """
    lengths = [len(prompt) for prompt in prompts]
    if min(lengths) == 0:
        raise InputError("a prompt is empty; begin it with BOS")
    if config.causal and max(lengths) > config.max_seq_len:
        raise InputError(
            f"a prompt of {max(lengths)} tokens does not fit the context of "
            f"{config.max_seq_len}; shorten it"
        )


def read_contexts(llama: Llama | Batch1Llama, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Compute the logits of the next tokens, `(batch, vocab_size)`, of a model without a mask.

    Without a mask every new token changes the states of all before it, so nothing can be cached:
    the last `max_seq_len` tokens go through the model for each new one. Rows of different lengths
    are read one by one, because padding would be attended to.
    """
    if len({len(row) for row in rows}) > 1:
        return torch.cat([read_contexts(llama, [row]) for row in rows])
    device, max_len = llama.tok_embeddings.weight.device, llama.config.max_seq_len
    tokens = torch.tensor([row[-max_len:] for row in rows], device=device)  # (batch, seqlen)
    last = tokens.new_full((len(rows), 1), tokens.shape[1] - 1)
    return llama.output(llama.hidden_states(tokens, last)[:, 0])


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
    cache = KVCache(llama, len(prompts), max_len)
    tokens = [torch.tensor(prompt, device=device) for prompt in prompts]
    last = torch.tensor(lengths, device=device)[:, None] - 1
    hidden = llama.hidden_states(pad_sequence(tokens, batch_first=True), last, cache=cache)
    cache.lengths = lengths  # forget the padding
    return llama.output(hidden[:, 0]), cache


def drop_full(
    active: list[int], rows: Sequence[Sequence[int]], config: LlamaConfig, n_new: int
) -> list[int]:
    """Keep the active rows whose context has room for a token; warn if one has not.

    Without a causal mask all have: old tokens leave the context.

    Args:
        n_new: number of tokens generated so far.
    """
    if not config.causal:
        return active
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
    """Draw the next id of each active row, `(n_active, 1)`, and append it to the row.

    Args:
        logits: `(n_active, vocab_size)`.
    """
    ids = sampling(logits, [rows[row] for row in active])
    for row, token in zip(active, ids[:, 0].tolist(), strict=True):
        rows[row].append(token)
    return ids
