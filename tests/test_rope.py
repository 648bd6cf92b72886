"""Rotary embedding and its fixture, against the formulas in float64."""

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from make_fixtures import rotary_fixture
from reference_math import rotary_embedding

from rope import apply_rotary_emb


@settings(deadline=None, max_examples=30)
@given(
    seqlen=st.integers(1, 40),
    half_dim=st.integers(1, 16),
    n_heads=st.integers(1, 3),
    theta=st.sampled_from([100.0, 10000.0, 500000.0]),
)
def test_equals_float64_numpy(seqlen, half_dim, n_heads, theta):
    query = torch.randn(2, seqlen, n_heads, 2 * half_dim)
    key = torch.randn(2, seqlen, 1, 2 * half_dim)
    outputs = apply_rotary_emb(query, key, 2 * half_dim, 40, theta)
    for ours, x in zip(outputs, (query, key), strict=True):
        assert np.allclose(ours.numpy(), rotary_embedding(x.numpy(), theta), atol=2e-5)


def test_far_positions_stay_exact():
    query = torch.randn(1, 1024, 1, 64)
    ours, _ = apply_rotary_emb(query, query, 64, 1024)
    assert np.allclose(ours.numpy(), rotary_embedding(query.numpy()), atol=5e-4)


def test_positions_may_start_anywhere_and_differ_by_row():
    x = torch.randn(2, 12, 1, 8)
    whole, _ = apply_rotary_emb(x, x, 8, 12)
    same, _ = apply_rotary_emb(x[:, 5:9], x[:, 5:9], 8, 12, start=5)
    assert torch.equal(same, whole[:, 5:9])
    rows = torch.stack((x[0, 2:6], x[1, 7:11]))
    differing, _ = apply_rotary_emb(rows, rows, 8, 12, start=torch.tensor([2, 7]))
    assert torch.equal(differing, torch.stack((whole[0, 2:6], whole[1, 7:11])))


def test_keeps_types_and_lets_gradients_through_after_inference_mode():
    with torch.inference_mode():  # the table is made here
        x = torch.randn(1, 3, 1, 10, dtype=torch.bfloat16)
        assert apply_rotary_emb(x, x, 10, 7)[0].dtype == torch.bfloat16
    query = torch.randn(1, 3, 1, 10, requires_grad=True)
    apply_rotary_emb(query, query, 10, 7)[0].square().sum().backward()
    assert torch.allclose(query.grad, 2 * query.detach(), atol=1e-5)  # a rotation keeps lengths


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="even"):
        apply_rotary_emb(torch.ones(1, 2, 1, 3), torch.ones(1, 2, 1, 3), 3, 8)
    with pytest.raises(ValueError, match="9 tokens do not fit the context of 8"):
        apply_rotary_emb(torch.ones(1, 9, 1, 4), torch.ones(1, 9, 1, 4), 4, 8)


def test_any_memory_layout_is_taken():
    x = torch.randn(1, 3, 2, 9)
    odd_offset, strided = x[..., 1:], x.transpose(1, 3)[..., :2, :].transpose(1, 3)
    assert odd_offset.storage_offset() % 2
    for view in (odd_offset, strided[..., :8]):
        ours, _ = apply_rotary_emb(view, view, 8, 9)
        assert torch.equal(ours, apply_rotary_emb(view.clone(), view, 8, 9)[0])


def test_the_committed_fixture_is_the_formula():
    committed = torch.load(ROOT / "rotary_embedding_actual.data", weights_only=True)
    for ours, formula in zip(committed, rotary_fixture(), strict=True):
        assert torch.equal(ours, formula)


def test_the_committed_fixture_agrees_with_the_official_one(assets):
    committed = torch.load(ROOT / "rotary_embedding_actual.data", weights_only=True)
    official = torch.load(assets / "rotary_embedding_actual.data", weights_only=True)
    for ours, theirs in zip(committed, official, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
