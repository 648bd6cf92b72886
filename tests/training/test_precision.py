"""Tests of the checks of losses and gradients."""

import pytest
import torch

from minllama.common.errors import InputError
from minllama.training.precision import check_finite, clip_gradients


def test_scores_that_are_not_finite_may_be_the_weights_fault() -> None:
    """Weights that were damaged before training give them at every learning rate."""
    with pytest.raises(InputError, match=r"nan in step 1; lower --lr, or take other weights"):
        check_finite(torch.tensor([0.5, torch.nan]), "step 1")
    model = torch.nn.Linear(1, 1)
    model(torch.tensor([[torch.inf]])).sum().backward()
    with pytest.raises(InputError, match=r"in step 1; lower --lr, or take other weights"):
        clip_gradients(model, 1.0, "step 1")
