"""Batches of rows of about the same length."""

import pytest
import torch

import minllama.text.labelled
from minllama.text.labelled import LengthBatchSampler

LENGTHS = [int(n) for n in torch.randint(3, 60, (203,), generator=torch.Generator().manual_seed(0))]


def draw(seed: int, batch_size: int = 10) -> list[list[int]]:
    torch.manual_seed(seed)
    return list(LengthBatchSampler(LENGTHS, batch_size))


@pytest.fixture(autouse=True)
def small_pools(monkeypatch):
    monkeypatch.setattr(minllama.text.labelled, "POOL", 4)


def test_every_row_comes_once_an_epoch():
    batches = draw(0)
    assert sorted(row for batch in batches for row in batch) == list(range(203))
    assert sorted(map(len, batches)) == [3] + [10] * 20
    assert len(LengthBatchSampler(LENGTHS, 10)) == len(batches)


def test_batches_follow_from_the_seed():
    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    torch.manual_seed(0)
    sampler = LengthBatchSampler(LENGTHS, 10)
    assert list(sampler) != list(sampler)  # another order each epoch


def test_rows_of_a_batch_are_of_about_the_same_length():
    def padded(batches):
        return sum(len(batch) * max(LENGTHS[row] for row in batch) for batch in batches)

    rows = torch.randperm(203).tolist()
    shuffled = padded([rows[i : i + 10] for i in range(0, 203, 10)])
    assert padded(draw(0)) - sum(LENGTHS) < 0.4 * (shuffled - sum(LENGTHS))


def test_the_longest_row_comes_first_and_the_rest_is_shuffled():
    for seed in range(5):
        longest = [max(LENGTHS[row] for row in batch) for batch in draw(seed)]
        assert longest[0] == max(LENGTHS)
        assert longest != sorted(longest, reverse=True)


def test_one_small_pool_is_one_batch():
    assert [sorted(batch) for batch in LengthBatchSampler([5, 3, 4], 10)] == [[0, 1, 2]]


def test_the_largest_batch_comes_first_even_if_a_small_one_has_the_longest_row():
    for seed in range(300):
        torch.manual_seed(seed)
        lengths = [int(n) for n in torch.randint(3, 60, (45,))]
        sampler = LengthBatchSampler(lengths, 10)
        sizes = [len(batch) * max(lengths[i] for i in batch) for batch in sampler]
        assert sizes[0] == max(sizes)
