"""What is faster on a CPU, against float64, PyTorch's own and the plain model."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, make_llama

from base_llama import replace
from config import LlamaConfig
from llama import Attention, RMSNorm
from minllama.kernels.cpu import (
    MAX_PLAIN,
    FastAttention,
    FastLinear,
    OneDNNProduct,
    accelerate,
)
from minllama.methods.lora import LoRALinear


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def fast_linear() -> FastLinear:
    return FastLinear(torch.nn.Linear(24, 16, bias=False))


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
    linear = fast_linear()
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


def test_products_keep_the_precision_they_are_asked_for():
    linear, x = fast_linear(), torch.randn(8, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x).dtype == torch.bfloat16
    assert linear.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


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


def test_compiled_models_take_pytorchs_own_products():
    linear, x = fast_linear(), torch.randn(10, 24)
    assert torch._dynamo.explain(linear)(x).graph_break_count == 0


def test_a_wrong_width_is_named():
    with pytest.raises(RuntimeError, match="10x23"):
        fast_linear()(torch.randn(10, 23))


def fast_attention(**config) -> FastAttention:
    heads = {"dim": 32, "n_heads": 4}
    return FastAttention(Attention(LlamaConfig(**heads, **config)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("n_before", [0, 3])
def test_fast_attention_is_the_plain_one_with_its_gradients(causal, n_kv_heads, n_before):
    torch.manual_seed(0)
    fast = fast_attention(n_kv_heads=n_kv_heads, causal=causal)
    query = torch.randn(3, 4, 11, 8, requires_grad=True)
    shape = (3, n_kv_heads, n_before + 11, 8)
    key, value = (torch.randn(shape, requires_grad=True) for _ in range(2))
    weights = torch.randn(3, 4, 11, 8)
    results = []
    for scores in (
        fast.compute_query_key_value_scores,
        super(FastAttention, fast).compute_query_key_value_scores,
    ):
        output = scores(query, key, value)
        gradients = torch.autograd.grad((output * weights).sum(), (query, key, value))
        results.append([output, *gradients])
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("seqlen", [60, MAX_PLAIN + 1])
def test_bfloat16_sequences_are_as_exact_as_their_scores_allow(seqlen):
    """Scores below 4 in bfloat16 are known to 2⁻⁸, so the weights are to about that fraction."""
    torch.manual_seed(0)
    query = torch.randn(2, 4, seqlen, 8).bfloat16()
    key, value = torch.randn(2, 2, 2, seqlen, 8).bfloat16()
    exact = F.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), is_causal=True, enable_gqa=True
    )
    attention = fast_attention(n_kv_heads=2, causal=True)
    output = attention.compute_query_key_value_scores(query, key, value)
    assert output.dtype == torch.bfloat16
    assert (output - exact).abs().max() < 2**-7 * exact.abs().max()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_kept_for_the_next_tensors():
    """A tensor in the place of one that was freed needs no new pages."""
    code = """
import resource, torch
from minllama.kernels.cpu import keep_freed_memory
keep_freed_memory()
faults = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
for size in (64 << 20, 60 << 20):
    torch.ones(size, dtype=torch.uint8)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[1] - faults[0], faults[2] - faults[1])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    first, second = map(int, done.stdout.split())
    assert second < first / 10


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_accelerated_model_is_the_plain_one(causal, dtype):
    """Its states and its gradients, except for the rounding of the precision."""
    tokens = torch.randint(4, 320, (3, 20), generator=torch.Generator().manual_seed(1))
    results = []
    for fast in (False, True):
        llama = make_llama(causal=causal, scale=2.0).train()
        names, state = list(llama.state_dict()), torch.get_rng_state()
        if fast:
            accelerate(llama)
            accelerate(llama)  # once more changes nothing
            kinds = {type(module) for module in llama.modules()}
            assert not kinds & {torch.nn.Linear, Attention, RMSNorm}
            assert llama.tok_embeddings.weight is llama.output.weight
            assert torch.equal(torch.get_rng_state(), state)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            hidden = llama.hidden_states(tokens)
        hidden.float().square().mean().backward()
        results.append([hidden.detach(), *(p.grad for p in llama.parameters())])
        assert list(llama.state_dict()) == names
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for plain, fast in zip(*results, strict=True):
        assert relative_error(fast.float(), plain.float()) < tolerance


def test_what_a_method_has_put_in_stays():
    llama = make_llama()
    lora = LoRALinear(llama.layers[0].attention.compute_query, 2, 1.0, 0.0)
    replace(llama, "layers.0.attention.compute_query", lora)
    accelerate(llama)
    assert llama.layers[0].attention.compute_query is lora
