"""Replacing parts of a model, and building modules without initial weights."""

import pytest
import torch
from conftest import make_llama
from torch import nn

from base_llama import NoInitialWeights, replace


@pytest.mark.parametrize("training", [True, False])
def test_a_replaced_part_is_in_the_mode_of_the_part(training):
    llama = make_llama().train(training)
    new = nn.Dropout()
    replace(llama, "layers.1.attention.resid_dropout", new)
    assert llama.layers[1].attention.resid_dropout is new
    assert new.training == training


def test_weights_that_are_not_drawn_leave_the_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with NoInitialWeights():
        make = nn.Linear(3, 3), nn.Embedding(3, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.requires_grad for module in make for parameter in module.parameters())
    nn.Linear(3, 3)
    assert not torch.equal(torch.get_rng_state(), before)
