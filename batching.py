"""Loaders of batches; for causal models, of rows of about the same length to save padding."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from dataset import EncodedDataset, Example

POOL = 100  # batches that are formed together in training


def make_loader(
    data: Sequence[Example],
    args: Any,
    *,
    causal: bool,
    shuffle: bool = False,
    with_lengths: bool = False,
) -> DataLoader:
    """Batches as the assignment forms them; for a causal model, of rows of about the same length.

    Args:
        args: any object with `batch_size`, and what `LlamaDataset` takes.
        shuffle: for training.
        with_lengths: let batches carry the rows' lengths; for a causal model they always do.
    """
    dataset = EncodedDataset(data, args, with_lengths=causal or with_lengths)
    if not causal:
        return DataLoader(
            dataset, shuffle=shuffle, batch_size=args.batch_size, collate_fn=dataset.collate_fn
        )
    sampler = LengthBatchSampler if shuffle else SortedBatchSampler
    batches = sampler([len(ids) for _, _, ids in data], args.batch_size)
    # Every pass over a loader draws a number; evaluation shall not change what training draws.
    generator = None if shuffle else torch.Generator()
    collate_fn = dataset.collate_fn
    return DataLoader(dataset, batch_sampler=batches, collate_fn=collate_fn, generator=generator)


class LengthBatchSampler(Sampler[list[int]]):
    """Training batches: every row once an epoch, in an order from the global generator.

    The rows are shuffled; pools of `POOL` batches are sorted by length and cut into batches, whose
    order is shuffled again. The largest batch, padding included, comes first, so that running out
    of memory shows at once. The last batch of the last pool may be smaller.

    Args:
        lengths: of the rows.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int):
        self.lengths, self.batch_size = lengths, batch_size

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        rows = torch.randperm(len(self.lengths)).tolist()
        batches = []
        for pool in cut(rows, POOL * self.batch_size):
            pool.sort(key=self.lengths.__getitem__, reverse=True)
            batches += cut(pool, self.batch_size)
        batches = [batches[i] for i in torch.randperm(len(batches)).tolist()]
        largest = max(
            range(len(batches)), key=lambda i: len(batches[i]) * self.lengths[batches[i][0]]
        )
        batches[0], batches[largest] = batches[largest], batches[0]
        return iter(batches)


class SortedBatchSampler(Sampler[list[int]]):
    """Evaluation batches: the rows from the longest to the shortest.

    Attributes:
        order: the row at each place of that order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int):
        self.order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(cut(self.order, self.batch_size))


def cut(rows: list[int], size: int) -> list[list[int]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]
