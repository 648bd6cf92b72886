"""Mixout against its definition."""

import pytest
import torch
from conftest import make_llama
from methods_kit import train

from minllama.methods.mixout import MixoutLinear, add_mixout

pytest_plugins = ["methods_fixtures"]


def test_mixout_of_nothing_is_plain_training(make_model):
    plain, mixed = make_model(), make_model()
    add_mixout(mixed.llama, 0.0)
    assert train(plain) == pytest.approx(train(mixed), abs=1e-5)
    for (name, a), b in zip(plain.named_parameters(), mixed.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5), name


def test_mixout_acts_on_all_linear_layers_of_the_layers(make_model):
    plain, mixed = make_model(), make_model()
    losses = train(mixed, mixout=0.5)
    assert sum(isinstance(module, MixoutLinear) for module in mixed.modules()) == 2 * 7
    assert losses[1:] != pytest.approx(train(plain)[1:], abs=1e-4)


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
