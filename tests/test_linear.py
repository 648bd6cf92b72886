"""The linear layer's products from oneDNN, against float64 and PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F

from linear import Linear, OneDNNProduct, product


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def inputs() -> dict[str, torch.Tensor]:
    """Inputs of 24 features in all layouts that a model makes."""
    torch.manual_seed(0)
    return {
        "contiguous": torch.randn(4, 5, 24),
        "matrix": torch.randn(40, 24),
        "transposed": torch.randn(24, 40).t(),
        "sliced": torch.randn(4, 9, 30)[:, ::2, 3:27],
        "swapped": torch.randn(5, 4, 24).transpose(0, 1),
        "expanded": torch.randn(1, 5, 24).expand(4, 5, 24),
        "of four dimensions": torch.randn(2, 3, 4, 24),
        "few rows": torch.randn(2, 3, 24),
        "one row": torch.randn(24),
        "no rows": torch.randn(0, 24),
    }


@pytest.mark.parametrize("layout", inputs())
def test_products_and_gradients_equal_float64(layout):
    x = inputs()[layout].detach().requires_grad_()
    linear = Linear(24, 16)
    output = linear(x)
    weights = torch.randn(output.shape)
    (output * weights).sum().backward()

    exact_x = x.detach().double().requires_grad_()
    exact_weight = linear.weight.detach().double().requires_grad_()
    exact = F.linear(exact_x, exact_weight)
    (exact * weights).sum().backward()
    assert output.shape == exact.shape
    assert x.grad.shape == x.shape
    if x.numel():
        assert relative_error(output, exact) < 1e-6
        assert relative_error(x.grad, exact_x.grad) < 1e-6
        assert relative_error(linear.weight.grad, exact_weight.grad) < 1e-6


def test_many_float32_rows_go_to_onednn_and_nothing_else(monkeypatch):
    calls = []
    monkeypatch.setattr(OneDNNProduct, "apply", lambda x, weight: calls.append(x) or x @ weight.t())
    linear = Linear(24, 16)
    linear(torch.randn(8, 24))
    assert len(calls) == torch.backends.mkldnn.is_available()
    calls.clear()
    linear(torch.randn(7, 24))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.randn(8, 24)).dtype == torch.bfloat16
    linear.bfloat16()(torch.randn(8, 24).bfloat16())
    assert not calls


def test_gradients_only_where_they_are_wanted():
    linear, x = Linear(24, 16), torch.randn(10, 24, requires_grad=True)
    linear.weight.requires_grad_(False)
    linear(x).sum().backward()
    assert x.grad is not None
    assert linear.weight.grad is None
    linear.weight.requires_grad_()
    linear(x.detach()).sum().backward()
    assert linear.weight.grad is not None
    with torch.no_grad():
        assert not linear(x).requires_grad


def test_second_derivatives_equal_pytorchs():
    torch.manual_seed(0)
    x, weight = torch.randn(10, 24), torch.randn(16, 24)
    seconds = []
    for linear in (OneDNNProduct.apply, F.linear):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        firsts = torch.autograd.grad(linear(*leaves).pow(3).sum(), leaves, create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.pow(2).sum() for g in firsts), leaves))
    for ours, theirs in zip(*seconds, strict=True):
        assert relative_error(ours, theirs) < 1e-5


def test_function_transforms_and_forward_mode_work():
    torch.manual_seed(0)
    x, weight = torch.randn(4, 10, 24), torch.randn(16, 24)
    results = []
    for linear in (product, F.linear):

        def loss(weight, x, linear=linear):
            return linear(x, weight).pow(2).sum()

        results.append(
            (
                torch.func.grad(loss)(weight, x),
                torch.func.vmap(torch.func.grad(loss), (None, 0))(weight, x),
                *torch.func.jvp(lambda w, loss=loss: loss(w, x), (weight,), (weight * 2,)),
            )
        )
    for ours, theirs in zip(*results, strict=True):
        assert relative_error(ours, theirs) < 1e-5


def test_compiled_models_take_pytorchs_own_products():
    linear, x = Linear(24, 16), torch.randn(10, 24)
    assert torch._dynamo.explain(linear)(x).graph_break_count == 0


def test_a_wrong_width_is_named():
    with pytest.raises(RuntimeError, match="10x23"):
        Linear(24, 16)(torch.randn(10, 23))
