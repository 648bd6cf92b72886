"""Loss, accuracy, perplexity and bits per byte against their definitions in float64."""

import math

import numpy as np
import pytest
import torch

from minllama.evaluation.language_model import next_token_loss, scores_of, total_counts
from minllama.text.sequences import IGNORED

BOS = 1


def test_scores_are_those_of_their_definitions():
    rng = np.random.default_rng(0)
    nats, n_correct, n_counted, batches = 0.0, 0, 0, []
    for _ in range(3):
        logits, targets = rng.normal(size=(2, 6, 9)), rng.integers(2, 9, (2, 6))
        targets[0, 2], targets[1, 4:] = BOS, IGNORED
        logits[0, 3, targets[0, 3]] = 9  # predicted correctly
        tensor = torch.tensor(logits, dtype=torch.float32, requires_grad=True)
        loss, counts = next_token_loss(tensor, torch.tensor(targets), BOS)
        loss.backward()
        batches.append(counts)

        probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        summed, gradient = 0.0, probabilities.copy()
        for i, j in np.ndindex(2, 6):
            target = targets[i, j]
            if target == IGNORED:
                gradient[i, j] = 0
                continue
            summed -= math.log(probabilities[i, j, target])
            gradient[i, j, target] -= 1
            if target != BOS:
                nats -= math.log(probabilities[i, j, target])
                n_correct += int(logits[i, j].argmax() == target)
                n_counted += 1
        assert loss.item() == pytest.approx(summed, rel=1e-6)
        np.testing.assert_allclose(tensor.grad, gradient, atol=1e-6)

    assert n_counted == 27 and 0 < n_correct < n_counted
    scores = scores_of(total_counts(batches), tokens_per_byte=0.25)
    assert scores == pytest.approx(
        {
            "loss": nats / n_counted,
            "accuracy": n_correct / n_counted,
            "perplexity": math.exp(nats / n_counted),
            "bits_per_byte": nats / math.log(2) / (n_counted / 0.25),
        },
        rel=1e-6,
    )


def test_a_diverged_model_has_a_perplexity_all_the_same():
    assert math.isfinite(scores_of(torch.tensor([1.0, 0, 1e6]), 1)["perplexity"])
