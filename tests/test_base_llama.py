"""Replacing parts of a model, and the names of tensors in wrappers."""

import pytest
import torch
from conftest import make_llama
from torch import nn

from base_llama import NoInitialWeights, Wrapper, load_state, named_weights, replace, state_of


class Scaled(Wrapper):
    def __init__(self, wrapped: nn.Module):
        super().__init__(wrapped)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, *args, **kwargs):
        return self.scale * self.wrapped(*args, **kwargs)


def test_a_replaced_part_is_in_the_mode_of_the_part():
    for training in (True, False):
        llama = make_llama().train(training)
        new = nn.Dropout()
        replace(llama, "layers.1.attention.resid_dropout", new)
        assert llama.layers[1].attention.resid_dropout is new
        assert new.training == training


def test_tensors_keep_their_names_in_wrappers():
    plain, wrapped = make_llama(), make_llama()
    replace(wrapped, "layers.0.feed_forward.w1", Scaled(wrapped.layers[0].feed_forward.w1))
    replace(wrapped, "layers.0", Scaled(wrapped.layers[0]))
    added = {"layers.0.scale", "layers.0.feed_forward.w1.scale"}
    assert state_of(wrapped).keys() == state_of(plain).keys() | added
    assert named_weights(wrapped).keys() == named_weights(plain).keys() | added
    state = {name: tensor + 1 for name, tensor in state_of(wrapped).items()}
    load_state(wrapped, state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in state_of(wrapped).items())
    with pytest.raises(ValueError, match=r"layers\.0\.scale"):
        load_state(wrapped, state_of(plain))
    with pytest.raises(ValueError, match=r"layers\.0\.scale"):
        load_state(plain, state, strict=False)


def test_two_tensors_of_one_name_are_refused():
    class Hiding(Wrapper):
        def __init__(self, wrapped):
            super().__init__(wrapped)
            self.weight = nn.Parameter(torch.ones(1))

    with pytest.raises(ValueError, match="two tensors are called weight"):
        named_weights(Hiding(nn.Linear(2, 2)))


def test_weights_that_are_not_drawn_leave_the_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with NoInitialWeights():
        make = nn.Linear(3, 3), nn.Embedding(3, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.requires_grad for module in make for parameter in module.parameters())
    nn.Linear(3, 3)
    assert not torch.equal(torch.get_rng_state(), before)
