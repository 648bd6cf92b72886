"""Sequences for training and evaluation."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from text_kit import words, write_documents

from minllama.text.documents import Corpus
from minllama.text.sequences import (
    IGNORED,
    EvaluationSequences,
    TrainingSequences,
    training_batches,
)
from minllama.text.tokenized import tokenize


@pytest.fixture
def text(tmp_path, tokenizer):
    """40 documents of 1 to 40 words."""
    paths = write_documents(tmp_path / "a.txt", [words(n, seed=n) for n in range(1, 41)])
    return tokenize(Corpus(paths, (1, 0, 0)), tokenizer, tmp_path / "tokens")["train"]


@pytest.mark.parametrize("offset", [0, 1, 7])
def test_training_sequences_are_the_text_and_the_next_ids(text, offset):
    sequences = TrainingSequences(text, 8, offset)
    ids, seen = text.ids.tolist(), set()
    starts = [sequences.start_of(i) for i in range(len(sequences))]
    for i, start in enumerate(starts):
        tokens, targets = sequences[i]
        assert tokens.tolist() == ids[start : start + 8]
        assert targets.tolist() == ids[start + 1 : start + 9]
        seen.update(range(start, start + 9))
    assert seen == set(range(len(ids)))
    ends = [*text.starts[1:], len(ids)]
    expected = [start for start in text.starts if offset]
    for start, end in zip(text.starts, ends, strict=True):
        expected += range(start + offset, end, 8)
    assert starts == [min(start, len(ids) - 9) for start in expected]


def test_evaluation_predicts_every_id_except_bos_once(text):
    sequences = EvaluationSequences(text, 8)
    predicted = []
    for i in range(len(sequences)):
        tokens, targets = sequences[i]
        n = int((targets != IGNORED).sum())
        start, end = sequences.bounds_of(i)
        assert end == start + n + 1
        assert tokens[:n].tolist() == text.ids[start : start + n].tolist()
        assert targets[:n].tolist() == text.ids[start + 1 : start + 1 + n].tolist()
        assert (targets[n:] == IGNORED).all()
        predicted += range(start + 1, start + 1 + n)
    assert predicted == sorted(set(range(len(text))) - set(text.starts.tolist()))


def test_some_evaluation_sequences_are_spread_over_the_text(text):
    every = EvaluationSequences(text, 8)
    some = EvaluationSequences(text, 8, n_sequences=5)
    expected = [every.bounds_of(i * (len(every) - 1) // 4) for i in range(5)]
    assert [some.bounds_of(i) for i in range(len(some))] == expected


def test_sequences_of_a_huge_document_take_no_memory():
    """Two billion sequences: one number for each would be 16 GB."""
    n_tokens = 1 << 40

    class Huge:
        starts = np.zeros(1, np.int64)

        def __len__(self):
            return n_tokens

    training, scored = TrainingSequences(Huge(), 512, 5), EvaluationSequences(Huge(), 512, 3)
    assert len(training) == n_tokens // 512 + 1
    places = [0, 1, 2, 2_000_000_000]
    assert [training.start_of(i) for i in places] == [0, 5, 517, 5 + 512 * 1999999999]
    assert training.start_of(len(training) - 1) == n_tokens - 513
    assert [scored.bounds_of(i)[0] for i in (0, 2)] == [0, n_tokens - 512]


def take(text, n, seed=3, skip=0):
    batches = training_batches(text, 8, 4, seed, skip)
    return [tuple(row) for tokens, _ in itertools.islice(batches, n) for row in tokens.tolist()]


def test_an_epoch_has_no_sequence_twice(text):
    epochs = []
    for offset in range(8):
        sequences = TrainingSequences(text, 8, offset)
        epochs.append(Counter(tuple(tokens.tolist()) for tokens, _ in sequences))
    drawn = Counter(take(text, min(epoch.total() for epoch in epochs) // 4))
    assert sum(drawn <= epoch for epoch in epochs) == 1


def test_skipped_batches_change_nothing(text):
    before = torch.get_rng_state()
    every = take(text, 120)  # of several epochs
    assert every != take(text, 120, seed=4)
    for skip in (1, 30, 50, 100):
        assert take(text, 20, skip=skip) == every[4 * skip : 4 * (skip + 20)]
    assert torch.equal(torch.get_rng_state(), before)
