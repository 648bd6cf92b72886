"""Prefix tuning against its definition."""

import math

import pytest
import torch
from conftest import make_llama
from methods_kit import TOKENS

from minllama.inference.cache import KVCache
from minllama.methods.prefix_tuning import PrefixAttention, add_prefix

pytest_plugins = ["methods_fixtures"]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_a_prefix_is_more_keys_and_values(causal, n_kv_heads):
    torch.manual_seed(0)
    plain = make_llama(causal=causal, n_kv_heads=n_kv_heads).layers[0].attention
    attention = PrefixAttention(plain, *torch.randn(2, n_kv_heads, 5, 8))
    query = torch.randn(2, 4, 7, 8)
    key, value = torch.randn(2, 2, n_kv_heads, 7, 8)
    keys, values = (
        torch.cat((p.detach().expand(2, -1, -1, -1), x), dim=2)
        .repeat_interleave(4 // n_kv_heads, dim=1)
        .double()
        for p, x in ((attention.prefix_key, key), (attention.prefix_value, value))
    )
    scores = query.double() @ keys.transpose(-1, -2) / math.sqrt(8)
    if causal:
        hidden = torch.ones(7, 7, dtype=torch.bool).triu(1)
        scores[..., 5:] = scores[..., 5:].masked_fill(hidden, -math.inf)
    expected = scores.softmax(-1) @ values
    scores = attention.compute_query_key_value_scores(query, key, value)
    assert torch.allclose(scores.double(), expected, atol=1e-5)


def test_a_prefix_works_with_a_cache_and_ragged_rows():
    torch.manual_seed(0)
    llama = make_llama(causal=True)
    add_prefix(llama, 4)
    with torch.inference_mode():
        whole = llama.hidden_states(TOKENS[:2])
        cache = KVCache(llama, 2, 11)
        llama.hidden_states(TOKENS[:2, :6], cache=cache)
        cache.lengths = [6, 4]
        rows = torch.stack((TOKENS[0, 6:9], TOKENS[1, 4:7]))
        cached = llama.hidden_states(rows, cache=cache)
    assert torch.allclose(cached[0], whole[0, 6:9], atol=1e-4)
    assert torch.allclose(cached[1], whole[1, 4:7], atol=1e-4)


@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_a_prefix_begins_as_keys_and_values_of_tokens(n_kv_heads):
    """Before rotation: a head's key is its part of the product with the normed embedding."""
    llama = make_llama(n_kv_heads=n_kv_heads)
    torch.manual_seed(7)
    add_prefix(llama, 6)
    torch.manual_seed(7)
    tokens = torch.randint(320, (1, 6))[0].tolist()
    attention = llama.layers[0].attention
    for position, token in enumerate(tokens):
        x = llama.tok_embeddings.weight[token]
        normed = x / (x.square().mean() + 1e-5).sqrt() * llama.layers[0].attention_norm.weight
        for prefix, linear in (
            (attention.prefix_key, attention.compute_key),
            (attention.prefix_value, attention.compute_value),
        ):
            for head in range(n_kv_heads):
                expected = linear.weight[8 * head : 8 * head + 8] @ normed
                assert torch.allclose(prefix[head, position], expected, atol=1e-4)
