"""The step for CUDA graphs: traced whole, and equal to the plain one; on CUDA where there is it."""

import pytest
import torch
from conftest import make_llama

from inference.decoding import decode
from inference.graphs import GraphLlama
from inference.packing import pack
from inference.sampling import Sampling

PROMPTS = [[1, 5, 9], [1], [1, 7, 7, 7, 7, 7, 7]]


def tokens_of(llama, prompts) -> list:
    return list(decode(llama, prompts, 15, Sampling(0.0), ()))


@pytest.mark.parametrize("n_kv_heads", [4, 2])
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]], ids=["three", "one"])
def test_tokens_are_those_of_the_plain_step(n_kv_heads, prompts):
    """Traced as a whole, without what depends on the number of tokens."""
    plain = pack(make_llama(causal=True, n_kv_heads=n_kv_heads))
    torch._dynamo.reset()
    graph = GraphLlama(make_llama(causal=True, n_kv_heads=n_kv_heads), "float32", backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert tokens_of(graph, prompts) == tokens_of(plain, prompts)


def test_rows_that_end_are_not_compiled_for_each_number_of_rows():
    """More of them than Dynamo would compile a function for."""
    prompts = [[1, 5 + i] for i in range(12)]
    torch._dynamo.reset()
    graph = GraphLlama(make_llama(causal=True), "float32", backend="eager")
    ended: set[int] = set()
    steps = []
    for step in decode(graph, prompts, 12, Sampling(0.0), (), ended):
        steps.append(step)
        ended.add(len(ended))
    assert [sum(token is not None for token in step) for step in steps] == list(range(12, 0, -1))
    alone = decode(pack(make_llama(causal=True)), prompts[-1:], 12, Sampling(0.0), ())
    assert [step[-1] for step in steps] == [token for (token,) in alone]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_on_cuda_too(dtype):
    plain = pack(make_llama(causal=True).cuda(), dtype)
    graph = GraphLlama(make_llama(causal=True).cuda(), dtype)
    for prompts in (PROMPTS, PROMPTS[:1]):
        ours, theirs = tokens_of(graph, prompts), tokens_of(plain, prompts)
        assert ours[0] == theirs[0]
        if dtype == "float32":
            assert ours == theirs
