"""Padded batches, and batches of sentences of similar length."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

import minllama.text.batches
from minllama.text.batches import Batch, shuffled_batches
from minllama.text.labelled import LlamaDataset

LENGTHS = [int(n) for n in torch.randint(3, 60, (203,), generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize("eos", [True, False])
def test_the_assignments_dataset_tokenizes_the_sentences(tokenizer, tokenizer_path, eos):
    args = SimpleNamespace(max_sentence_len=2, tokenizer_path=str(tokenizer_path))
    data = [(f"the plot is thin {i}", i % 2, [1, 9, 8, 7]) for i in range(10)]
    dataset = LlamaDataset(data, args, eos)
    expected = tokenizer.encode("the plot is thin", bos=True, eos=False)[:3] + [2] * eos
    loader = DataLoader(dataset, shuffle=True, batch_size=4, collate_fn=dataset.collate_fn)
    batches = [Batch(**batch) for batch in loader]
    assert sorted(sent for batch in batches for sent in batch.sents) == [s for s, *_ in data]
    for batch in batches:
        assert batch.token_ids.tolist() == [expected] * len(batch.sents)
        assert batch.labels.tolist() == [int(sent[-1]) % 2 for sent in batch.sents]


def draw(seed: int, lengths=LENGTHS) -> list[list[int]]:
    torch.manual_seed(seed)
    return shuffled_batches(lengths, 10)


@pytest.fixture
def small_pools(monkeypatch):
    monkeypatch.setattr(minllama.text.batches, "POOL", 4)


def test_every_example_comes_once_an_epoch_in_another_order(small_pools):
    batches = draw(0)
    assert sorted(i for batch in batches for i in batch) == list(range(203))
    assert sorted(map(len, batches)) == [3] + [10] * 20
    assert batches == draw(0) != draw(1)


def test_the_examples_of_a_batch_are_of_similar_length(small_pools):
    def padded(batches):
        return sum(len(batch) * max(LENGTHS[i] for i in batch) for batch in batches)

    order = torch.randperm(203).tolist()
    shuffled = padded([order[i : i + 10] for i in range(0, 203, 10)])
    assert padded(draw(0)) - sum(LENGTHS) < 0.4 * (shuffled - sum(LENGTHS))


def test_the_largest_batch_comes_first_and_the_others_are_shuffled(small_pools):
    for seed in range(300):
        lengths = torch.randint(3, 60, (45,), generator=torch.Generator().manual_seed(seed))
        sizes = [
            len(batch) * max(int(lengths[i]) for i in batch)
            for batch in draw(seed, lengths.tolist())
        ]
        assert sizes[0] == max(sizes)
    longest = [max(LENGTHS[i] for i in batch) for batch in draw(0)]
    assert longest != sorted(longest, reverse=True)
