"""AdamW against its definition in float64, PyTorch's, and the official weights."""

import numpy as np
import pytest
import torch
from conftest import ROOT
from make_fixtures import optimizer_fixture
from reference_math import adamw

from optimizer import AdamW
from optimizer_test import train_linear


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("correct_bias", [True, False])
def test_equals_float64_numpy(weight_decay, correct_bias):
    settings = {
        "lr": 0.01,
        "betas": (0.8, 0.95),
        "eps": 1e-3,
        "weight_decay": weight_decay,
        "correct_bias": correct_bias,
    }
    rng = np.random.default_rng(0)
    starts = [rng.normal(size=(3, 4)), rng.normal(size=5)]
    gradients = [rng.normal(size=(20, *start.shape)) for start in starts]
    params = [torch.nn.Parameter(torch.tensor(start, dtype=torch.float32)) for start in starts]
    optimizer = AdamW(params, **settings)
    for step in range(20):
        for p, g in zip(params, gradients, strict=True):
            p.grad = torch.tensor(g[step], dtype=torch.float32)
        optimizer.step()
    for p, start, g in zip(params, starts, gradients, strict=True):
        expected = adamw(start, lambda t, _, g=g: g[t - 1], n_steps=20, **settings)
        assert np.allclose(p.detach().numpy(), expected, atol=2e-6)


def test_decay_is_not_lost_in_float32_rounding():
    """At lr · weight_decay = 1e-7, 1 - 1e-7 itself is not a float32."""
    start = torch.linspace(1, 2, 10001)
    p = torch.nn.Parameter(start.clone())
    optimizer = AdamW([p], lr=1e-5, weight_decay=1e-2)
    for _ in range(10):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    expected = start.double() * (1 - 1e-7) ** 10
    error = (p.detach().double() - expected).mean() / (start.double() - expected).mean()
    assert abs(error) < 0.1


def test_groups_keep_their_own_settings_and_late_gradients_their_own_step():
    """A parameter that first gets a gradient at step 3 is corrected as at its own step 1."""
    early, late, other = (torch.nn.Parameter(torch.zeros(1)) for _ in range(3))
    optimizer = AdamW([{"params": [early, late]}, {"params": [other], "lr": 0.5}], lr=0.1)
    for step in range(3):
        early.grad, other.grad = torch.ones(1), torch.ones(1)
        late.grad = torch.ones(1) if step == 2 else None
        optimizer.step()
    # With a constant gradient each corrected step has the length of the learning rate.
    assert early.item() == pytest.approx(-0.3, abs=1e-4)
    assert late.item() == pytest.approx(-0.1, abs=1e-4)
    assert other.item() == pytest.approx(-1.5, abs=1e-4)


def test_closure_is_evaluated_with_gradients():
    p = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = AdamW([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert p.item() == pytest.approx(1.9, abs=1e-4)


@pytest.mark.parametrize(
    "bad",
    [
        {"lr": -1.0},
        {"lr": float("nan")},
        {"betas": (1.0, 0.9)},
        {"betas": (0.9, -0.1)},
        {"eps": -1e-8},
        {"weight_decay": -0.1},
    ],
)
def test_values_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match="Invalid"):
        AdamW([torch.nn.Parameter(torch.zeros(1))], **bad)


def test_committed_fixture_is_the_formula():
    assert np.allclose(np.load(ROOT / "optimizer_test.npy"), optimizer_fixture(), atol=1e-7)


def test_committed_fixture_agrees_with_the_official_one(assets):
    committed = np.load(ROOT / "optimizer_test.npy")
    official = np.load(assets / "optimizer_test.npy")
    assert np.allclose(committed, official, atol=1e-5, rtol=1e-3)
    assert np.allclose(train_linear().numpy(), official, atol=1e-5, rtol=1e-3)
