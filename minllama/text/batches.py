"""Padded batches of tokenized sentences."""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

POOL = 100  # batches that are sorted by length together in training


class Example(NamedTuple):
    """A sentence, its label, and its token ids once it is tokenized."""

    sentence: str
    label: int
    ids: Sequence[int] = ()


@dataclass
class Batch:
    """Examples, padded on the right to the longest."""

    token_ids: torch.Tensor  # (batch, seqlen)
    labels: torch.Tensor  # (batch,)
    sents: list[str]
    lengths: torch.Tensor | None = None  # of each example before padding, (batch,)

    def select(self, examples: slice) -> "Batch":
        """Some of the examples, with the padding of the whole batch."""
        lengths = None if self.lengths is None else self.lengths[examples]
        return Batch(self.token_ids[examples], self.labels[examples], self.sents[examples], lengths)


def collate(examples: Sequence[Example], pad_id: int, with_lengths: bool = False) -> Batch:
    """Pad examples into a batch."""
    ids = [torch.tensor(example.ids) for example in examples]
    return Batch(
        token_ids=pad_sequence(ids, batch_first=True, padding_value=pad_id),
        labels=torch.tensor([example.label for example in examples]),
        sents=[example.sentence for example in examples],
        lengths=torch.tensor([len(tokens) for tokens in ids]) if with_lengths else None,
    )


def make_loader(
    examples: Sequence[Example],
    batch_size: int,
    pad_id: int,
    *,
    causal: bool,
    shuffle: bool = False,
    with_lengths: bool = False,
) -> DataLoader:
    """Batches as in the assignment; for a causal model, of similar lengths and `with_lengths`.

    Those are drawn here, once: shuffling again takes another loader.
    """
    collate_fn = functools.partial(collate, pad_id=pad_id, with_lengths=causal or with_lengths)
    data = cast("Dataset[Example]", examples)  # all that a loader needs are length and items
    if not causal:
        return DataLoader(data, shuffle=shuffle, batch_size=batch_size, collate_fn=collate_fn)
    lengths = [len(example.ids) for example in examples]
    batches = (
        shuffled_batches(lengths, batch_size) if shuffle else sorted_batches(lengths, batch_size)
    )
    # Each pass over a loader draws a number; evaluation must not change what training draws.
    generator = None if shuffle else torch.Generator()
    return DataLoader(data, batch_sampler=batches, collate_fn=collate_fn, generator=generator)


def sorted_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Evaluation batches: the indices of the examples from the longest to the shortest."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    return chunks(order, batch_size)


def shuffled_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Training batches of similar lengths, in an order from the global generator.

    Shuffled examples are sorted by length in pools of `POOL` batches; the batches are shuffled
    again. The largest, padding included, comes first: running out of memory shows at once.
    """
    batches: list[list[int]] = []
    for pool in chunks(torch.randperm(len(lengths)).tolist(), POOL * batch_size):
        pool.sort(key=lengths.__getitem__, reverse=True)
        batches += chunks(pool, batch_size)
    batches = [batches[i] for i in torch.randperm(len(batches)).tolist()]
    sizes = [len(batch) * lengths[batch[0]] for batch in batches]
    largest = sizes.index(max(sizes))
    batches[0], batches[largest] = batches[largest], batches[0]
    return batches


def chunks(items: list[int], size: int) -> list[list[int]]:
    """Cut a list into lists of `size` items; the last may have fewer."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def in_data_order(results: list, loader: DataLoader) -> list:
    """Put results of a loader's batches into the order of the data, if the batches are sorted."""
    if not isinstance(loader.batch_sampler, list):
        return results
    order = itertools.chain.from_iterable(loader.batch_sampler)
    by_index = dict(zip(order, results, strict=True))
    return [by_index[i] for i in range(len(results))]
