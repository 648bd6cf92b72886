"""Accuracy, F1, confusion matrix and the files of predictions and metrics."""

import pytest
import torch
from torch import nn

from minllama.evaluation.classification import model_eval
from minllama.text.batches import Example, make_loader

CPU = torch.device("cpu")


class FirstToken(nn.Module):
    """Predicts a sentence's label to be the number of its first token."""

    def forward(self, ids, lengths=None):
        return nn.functional.one_hot(ids[:, 0], 3).float()


@pytest.mark.parametrize("causal", [False, True])
def test_results_are_in_the_order_of_the_data(causal):
    predicted, labels = [0, 1, 2, 0, 1, 1, 0], [0, 1, 1, 0, 2, 1, 1]
    examples = [
        Example(f"s{i}", label, [prediction] + [0] * (i * 3 % 5))
        for i, (label, prediction) in enumerate(zip(labels, predicted, strict=True))
    ]
    loader = make_loader(examples, 2, 0, causal=causal)
    if causal:  # batches are of similar length, the largest first
        lengths = [len(examples[i].ids) for batch in loader.batch_sampler for i in batch]
        assert lengths == sorted(lengths, reverse=True)
    result = model_eval(loader, FirstToken(), CPU)
    assert result.predictions == predicted and result.labels == labels
    assert result.sentences == [f"s{i}" for i in range(7)]
    assert result.accuracy == pytest.approx(4 / 7)
    # F1 is 2 TP / (2 TP + FP + FN): 4 / 5 for label 0, 4 / 7 for label 1, 0 for label 2.
    assert result.macro_f1 == pytest.approx((4 / 5 + 4 / 7 + 0) / 3)
