"""Linear modules and whole models prepared for decoding, against plain ones."""

import pytest
import torch
from conftest import make_llama

from minllama.inference.decoding import decode
from minllama.inference.sampling import Sampling
from minllama.kernels.quantize import (
    DTYPES,
    MAX_INT8_ROWS,
    Batch1Linear,
    make_linear,
    prepare_for_decoding,
)

SHAPES = [(64, 96), (512, 64), (24, 172), (33, 50)]  # the last two do not suit every kernel


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n_rows", [1, 2, 7, MAX_INT8_ROWS, MAX_INT8_ROWS + 1])
def test_products_equal_plain_ones(shape, n_rows):
    torch.manual_seed(0)
    weight, x = torch.randn(shape), torch.randn(n_rows, 1, shape[1])
    exact = x.double() @ weight.double().T
    for dtype, tolerance in (("float32", 1e-6), ("bfloat16", 0.015), ("int8", 0.02)):
        y = make_linear(weight, dtype)(x)
        assert y.shape == exact.shape
        assert (y - exact).abs().max() < tolerance * exact.abs().max()


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_has_a_scale_for_each_output_channel(shape):
    """The product is that of the weights rounded to 127 steps of their own row's magnitude."""
    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.logspace(-3, 3, shape[0])[:, None]
    step = weight.double().abs().amax(dim=1, keepdim=True) / 127
    rounded = (weight / step).round() * step
    x = torch.randn(1, shape[1])
    exact = x.double() @ rounded.T
    linear = make_linear(weight, "int8")
    # Activations are float32 or bfloat16.
    tolerance = 1e-5 if isinstance(linear, Batch1Linear) else 0.01
    error = (linear(x) - exact).abs() / (x.double().abs() @ rounded.abs().T)
    assert error.max() < tolerance


def test_zero_rows_stay_zero():
    y = make_linear(torch.zeros(8, 32), "int8")(torch.randn(1, 32))
    assert torch.equal(y, torch.zeros(1, 8))


@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_a_prepared_float32_model_computes_the_same(n_kv_heads):
    plain = make_llama(causal=True, n_kv_heads=n_kv_heads)
    prepared = prepare_for_decoding(make_llama(causal=True, n_kv_heads=n_kv_heads))
    tokens = torch.randint(4, 320, (3, 20), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        for ids in (tokens, tokens[:1, :1]):
            ours, theirs = prepared(ids, targets=ids)[0], plain(ids, targets=ids)[0]
            assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    prompts = [[1, 5, 9], [1]]
    assert list(decode(prepared, prompts, 20, Sampling(0.0))) == list(
        decode(plain, prompts, 20, Sampling(0.0))
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_and_embedding_stay_float32(dtype):
    llama = prepare_for_decoding(make_llama(causal=True), dtype)
    assert {p.dtype for p in llama.parameters()} == {torch.float32}
    assert torch.equal(llama.tok_embeddings.weight, make_llama().tok_embeddings.weight)
