"""Padded batches of tokenized sentences."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import BatchSampler, DataLoader, Dataset

POOL = 100  # batches that are sorted by length together in training


class Example(NamedTuple):
    """A tokenized sentence and its label."""

    sentence: str
    label: int
    ids: list[int]


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
    """Batches as in the assignment; for a causal model, of similar lengths and `with_lengths`."""
    collate_fn = functools.partial(collate, pad_id=pad_id, with_lengths=causal or with_lengths)
    data = cast("Dataset[Example]", examples)  # all that a loader needs are length and items
    if not causal:
        return DataLoader(data, shuffle=shuffle, batch_size=batch_size, collate_fn=collate_fn)
    sampler = LengthBatchSampler if shuffle else SortedBatchSampler
    batches = sampler([len(example.ids) for example in examples], batch_size)
    # Each pass over a loader draws a number; evaluation must not change what training draws.
    generator = None if shuffle else torch.Generator()
    return DataLoader(data, batch_sampler=batches, collate_fn=collate_fn, generator=generator)


class LengthBatchSampler(BatchSampler):
    """Training batches of similar lengths, in an order from the global generator.

    Shuffled examples are sorted by length in pools of `POOL` batches; the batches are shuffled
    again. The largest, padding included, comes first: running out of memory shows at once.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int):
        super().__init__(range(len(lengths)), batch_size, drop_last=False)
        self.lengths = lengths

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(len(self.lengths)).tolist()
        pool_size = POOL * self.batch_size
        batches: list[list[int]] = []
        for start in range(0, len(order), pool_size):
            pool = order[start : start + pool_size]
            pool.sort(key=self.lengths.__getitem__, reverse=True)
            batches += BatchSampler(pool, self.batch_size, drop_last=False)
        batches = [batches[i] for i in torch.randperm(len(batches)).tolist()]
        sizes = [len(batch) * self.lengths[batch[0]] for batch in batches]
        largest = sizes.index(max(sizes))
        batches[0], batches[largest] = batches[largest], batches[0]
        return iter(batches)


class SortedBatchSampler(BatchSampler):
    """Evaluation batches: the examples from the longest to the shortest."""

    def __init__(self, lengths: Sequence[int], batch_size: int):
        self.order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
        super().__init__(self.order, batch_size, drop_last=False)

    def unsort(self, results: Sequence) -> list:
        """Put results that are in this order into the order of the data."""
        by_index = dict(zip(self.order, results, strict=True))
        return [by_index[i] for i in range(len(self.order))]
