"""Generation over token ids: the two ways to decode."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn.utils.rnn import pad_sequence

from minllama.common.errors import InputError
from minllama.inference.cache import KVCache
from minllama.inference.sampling import Sampling

if TYPE_CHECKING:
    from llama import Llama

BOS_ID, EOS_ID = STOP_IDS = (1, 2)  # of every Llama 2 tokenizer


def last_column(tokens: torch.Tensor) -> torch.Tensor:
    """The position of each row's last token, padding or not: `(batch, seqlen)` to `(batch, 1)`."""
    return torch.full((len(tokens), 1), tokens.shape[1] - 1, device=tokens.device)


@torch.inference_mode()
def decode(
    llama: Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: Collection[int] = STOP_IDS,
    ended: Collection[int] = (),
) -> Iterator[list[int | None]]:
    """Continue prompts of any lengths together, with a causal model and a cache.

    All prompts are read in one pass; each step then computes one token per row. A row ends at BOS
    or EOS, which is not yielded, or with a warning where its `max_seq_len` tokens of context,
    prompt included, are full. From there on it costs nothing.

    Args:
        stop_ids: what ends a row, in place of BOS and EOS.
        ended: rows that end too; looked into after every step, so that it may grow.

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
    logits = llama.output(hidden[:, 0])
    cache.lengths = lengths  # forgets the padding

    rows = [list(prompt) for prompt in prompts]
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
            logits = logits[fitting]
            if not going_on:
                return
        ids = sampling(logits, [rows[row] for row in going_on])
        new: list[int | None] = [None] * len(prompts)
        for row, token in zip(going_on, ids[:, 0].tolist(), strict=True):
            new[row] = None if token in stop_ids else token
            rows[row].append(token)
        if not any(token is not None for token in new):
            return
        yield new
        unended = [i for i, row in enumerate(going_on) if new[row] is not None and row not in ended]
        if not unended:
            return
        if len(unended) < len(going_on):
            going_on = [going_on[i] for i in unended]
            cache.keep(unended)
            ids = ids[unended]
        if step + 1 < max_new_tokens:
            logits = llama.next_logits(ids, cache)


@torch.inference_mode()
def decode_unmasked(
    llama: Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
) -> Iterator[list[int]]:
    """Continue prompts of one length with a model that attends without a mask.

    There, every new token changes the states of all before it, so nothing can be cached: the whole
    context, cropped to its last `max_seq_len` tokens, goes through the model for every token.

    Yields:
        at each step, every row's next id.
    """
    rows = [list(prompt) for prompt in prompts]
    context = torch.tensor(prompts, device=llama.tok_embeddings.weight.device)
    for _ in range(max_new_tokens):
        context = context[:, -llama.config.max_seq_len :]
        hidden = llama.hidden_states(context, last_column(context))
        ids = sampling(llama.output(hidden[:, 0]), rows)
        yield ids[:, 0].tolist()
        for row, token in zip(rows, ids[:, 0].tolist(), strict=True):
            row.append(token)
        context = torch.cat((context, ids), dim=1)
