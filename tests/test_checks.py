"""The checks of the assignment's parts tell right code from wrong code."""

import pytest
import torch
from conftest import ROOT

import optimizer_test
import rope_test
from optimizer import AdamW
from rope import apply_rotary_emb


def ignores_theta(query, key, head_dim, max_seq_len, theta=10000.0):
    return apply_rotary_emb(query, key, head_dim, max_seq_len)


def swaps_real_and_imaginary(query, key, head_dim, max_seq_len, theta=10000.0):
    swapped = (x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) for x in (query, key))
    return apply_rotary_emb(*swapped, head_dim, max_seq_len, theta)


def by_real_numbers(query, key, head_dim, max_seq_len, theta=10000.0):
    """Right, and written in another way."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2).double() / head_dim)
    angles = torch.arange(max_seq_len).double().outer(frequencies).repeat_interleave(2, -1)

    def rotate(x):
        other = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        seen = angles[: x.shape[1], None]
        return (x * seen.cos() + other * seen.sin()).float()

    return rotate(query), rotate(key)


class NoDecay(AdamW):
    def __init__(self, params, weight_decay=0.0, **settings):
        super().__init__(params, **settings)


class DecayInGradient(AdamW):
    """Adam with L2 regularization."""

    def step(self, closure=None):
        decays = [group["weight_decay"] for group in self.param_groups]
        for group, decay in zip(self.param_groups, decays, strict=True):
            group["weight_decay"] = 0.0
            for p in group["params"]:
                p.grad = p.grad + decay * p.detach()
        super().step(closure)
        for group, decay in zip(self.param_groups, decays, strict=True):
            group["weight_decay"] = decay


class OneGroup(AdamW):
    """Updates every group as the first."""

    def step(self, closure=None):
        for group in self.param_groups:
            group.update({name: self.param_groups[0][name] for name in ("lr", "weight_decay")})
        return super().step(closure)


class TorchAdamW(torch.optim.AdamW):
    """Right: decays first, and corrects the bias of both moments."""

    def __init__(self, params, correct_bias=True, **settings):
        super().__init__(params, **settings)


@pytest.mark.parametrize(
    ("check", "name", "variant", "is_right"),
    [
        (rope_test, "apply_rotary_emb", ignores_theta, False),
        (rope_test, "apply_rotary_emb", swaps_real_and_imaginary, False),
        (rope_test, "apply_rotary_emb", by_real_numbers, True),
        (optimizer_test, "AdamW", NoDecay, False),
        (optimizer_test, "AdamW", DecayInGradient, False),
        (optimizer_test, "AdamW", OneGroup, False),
        (optimizer_test, "AdamW", TorchAdamW, True),
    ],
)
def test_the_second_check_finds_what_the_first_does_not(
    monkeypatch, capsys, check, name, variant, is_right
):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(check, name, variant)
    if is_right:
        check.main()
    else:
        with pytest.raises(SystemExit, match="failed"):
            check.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[:1] and lines[0].endswith(" test passed!")
    assert len(lines) == 1 + is_right
