"""Mixout against its definition."""

import pytest
import torch
from conftest import make_llama
from methods_kit import snapshot, train

from minllama.methods.mixout import MixoutLinear

pytest_plugins = ["methods_fixtures"]


def test_all_layers_are_mixed_in_training(make_classifier):
    plain, mixed = make_classifier(), make_classifier(mixout=0.5)
    for classifier in (plain, mixed):
        torch.manual_seed(0)
        train(classifier)
    for name, tensor in snapshot(plain.model).items():
        if "layers" in name and "norm" not in name:
            assert not torch.allclose(tensor, mixed.model.get_parameter(name), atol=1e-4), name


def test_mixout_takes_weights_from_both_and_keeps_the_mean():
    torch.manual_seed(0)
    linear = MixoutLinear(make_llama().layers[0].feed_forward.w1, 0.3)
    with torch.no_grad():
        linear.weight.add_(torch.randn_like(linear.weight))
        mixtures = torch.stack([linear.mixed() for _ in range(4000)])
    weight, pretrained = linear.weight.detach(), linear.pretrained
    from_pretrained = (mixtures - pretrained).abs() < 1e-6
    current = (weight - 0.3 * pretrained) / 0.7  # (W - p·U) / (1 - p)
    assert torch.allclose(
        mixtures[~from_pretrained], current.expand_as(mixtures)[~from_pretrained], atol=1e-5
    )
    assert from_pretrained.float().mean().item() == pytest.approx(0.3, abs=0.005)
    assert (mixtures.mean(0) - weight).abs().max() < 0.06 * (weight - pretrained).abs().max()
    x = torch.randn(10, 32)
    assert torch.equal(linear.eval()(x), linear(x))
    assert torch.allclose(linear(x), x @ weight.T, atol=1e-5)
