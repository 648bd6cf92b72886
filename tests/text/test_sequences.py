"""Sequences for training and evaluation."""

import dataclasses
import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from text_kit import words, write_documents

from minllama.text.corpus import tokenize
from minllama.text.documents import Corpus
from minllama.text.sequences import (
    IGNORED,
    EvaluationSequences,
    TrainingSequences,
    training_batches,
)


@pytest.fixture
def text(tmp_path, tokenizer):
    """40 documents of 1 to 40 words."""
    paths = write_documents(tmp_path / "a.txt", [words(n, seed=n) for n in range(1, 41)])
    return tokenize(Corpus(paths, (1, 0, 0)), tokenizer, tmp_path / "tokens")["train"]


@pytest.fixture
def positions(text):
    """A text with the same documents, whose ids are their positions."""
    return dataclasses.replace(text, files=[np.arange(len(text))], tokenizer=LargeVocabulary)


class LargeVocabulary:
    n_words, bos_id = 1 << 50, -1


@pytest.mark.parametrize("offset", [0, 1, 7])
def test_training_sequences_are_the_text_and_the_next_ids(positions, offset):
    sequences, n_ids = TrainingSequences(positions, 8, offset), len(positions)
    starts = [int(sequences[i][0][0]) for i in range(len(sequences))]
    for i, start in enumerate(starts):
        tokens, targets = sequences[i]
        assert tokens.tolist() == list(range(start, start + 8))
        assert targets.tolist() == list(range(start + 1, start + 9))
    expected = positions.starts.tolist() if offset else []
    for start, end in itertools.pairwise([*positions.starts, n_ids]):
        expected += range(start + offset, end, 8)
    assert starts == [min(start, n_ids - 9) for start in expected]
    assert {i for start in starts for i in range(start, start + 9)} == set(range(n_ids))


def test_evaluation_predicts_every_id_except_bos_once(positions):
    sequences = EvaluationSequences(positions, 8)
    predicted = []
    for i in range(len(sequences)):
        tokens, targets = sequences[i]
        n = int((targets != IGNORED).sum())
        assert targets[:n].tolist() == (tokens[:n] + 1).tolist()
        assert targets[n:].tolist() == [IGNORED] * (8 - n)
        assert tokens[n:].tolist() == [-1] * (8 - n)
        predicted += targets[:n].tolist()
    assert predicted == sorted(set(range(len(positions))) - set(positions.starts.tolist()))


def test_some_evaluation_sequences_are_spread_over_the_text(positions):
    every = EvaluationSequences(positions, 8)
    some = EvaluationSequences(positions, 8, n_sequences=5)
    for i in range(len(some)):
        expected = every[i * (len(every) - 1) // 4]
        assert [ids.tolist() for ids in some[i]] == [ids.tolist() for ids in expected]
    assert len(some) == 5


def test_sequences_of_a_huge_document_take_no_memory():
    """Two billion sequences: one number for each would be 16 GB."""
    n_tokens = 1 << 40

    class Huge:
        starts, tokenizer = np.zeros(1, np.int64), LargeVocabulary

        def __len__(self):
            return n_tokens

        def __getitem__(self, where):
            return np.arange(where.start, where.stop)

    training, scored = TrainingSequences(Huge(), 512, 5), EvaluationSequences(Huge(), 512, 3)
    assert len(training) == n_tokens // 512 + 1
    starts = [int(training[i][0][0]) for i in (0, 1, 2, 2_000_000_000, len(training) - 1)]
    assert starts == [0, 5, 517, 5 + 512 * 1999999999, n_tokens - 513]
    assert [int(scored[i][0][0]) for i in (0, 2)] == [0, n_tokens - 512]


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
