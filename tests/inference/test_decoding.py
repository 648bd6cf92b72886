"""Cached decoding against whole forward passes; prompts of any length; full contexts."""

import warnings

import pytest
import torch
from conftest import make_llama

from minllama.common.errors import InputError
from minllama.inference.cache import KVCache
from minllama.inference.decoding import STOP_IDS, decode
from minllama.inference.sampling import Sampling


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def random_ids(*shape, seed=1):
    return torch.randint(4, 320, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_cached_logits_are_the_uncached_ones_at_every_position(batch_size, n_kv_heads):
    """In passes of one and of several tokens, up to the end of the context."""
    llama = make_llama(causal=True, n_kv_heads=n_kv_heads, max_seq_len=48)
    tokens = random_ids(batch_size, 48)
    with torch.inference_mode():
        expected, _ = llama(tokens, targets=tokens)
        cache = KVCache(llama.config, batch_size, 48)
        logits = []
        for part in torch.split(tokens, [7, 1, 1, 5, *[1] * 30, 4], dim=1):
            logits.append(llama.output(llama.hidden_states(part, cache=cache)))
    assert cache.lengths == [48] * batch_size
    assert relative_error(torch.cat(logits, dim=1), expected) < 1e-5


@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_rows_of_different_lengths_share_a_cache(n_kv_heads):
    """Each row's states are those it has alone, also several tokens at a time."""
    llama = make_llama(causal=True, n_kv_heads=n_kv_heads)
    tokens, lengths = random_ids(3, 40), [5, 17, 11]
    with torch.inference_mode():
        cache = KVCache(llama.config, 3, 40)
        llama.hidden_states(tokens[:, :17], cache=cache)
        cache.lengths = lengths
        for n in (1, 1, 3, 1):
            starts = cache.lengths
            part = torch.stack([row[i : i + n] for row, i in zip(tokens, starts, strict=True)])
            hidden = llama.hidden_states(part, cache=cache)
            for row, start in enumerate(starts):
                alone = llama.hidden_states(tokens[row : row + 1, : start + n])[0, start:]
                assert relative_error(hidden[row], alone) < 1e-5


def test_tokens_can_be_forgotten():
    llama = make_llama(causal=True)
    tokens = random_ids(2, 20)
    with torch.inference_mode():
        cache = KVCache(llama.config, 2, 20)
        llama.hidden_states(tokens[:, :10], cache=cache)
        llama.hidden_states(random_ids(2, 6, seed=9), cache=cache)
        cache.lengths = [10, 10]
        again = llama.hidden_states(tokens[:, 10:], cache=cache)
        assert relative_error(again, llama.hidden_states(tokens)[:, 10:]) < 1e-5


def test_nothing_is_cached_without_a_mask():
    llama = make_llama()
    with pytest.raises(ValueError, match="nothing can be cached"):
        llama.hidden_states(random_ids(1, 3), cache=KVCache(llama.config, 1, 8))


def greedy(llama, prompt, n):
    """Without cache, token by token."""
    ids = torch.tensor([prompt])
    for _ in range(n):
        with torch.inference_mode():
            token = llama(ids)[0][0, -1].argmax()
        if token in STOP_IDS:
            break
        ids = torch.cat((ids, token.view(1, 1)), dim=1)
    return ids[0, len(prompt) :].tolist()


def test_prompts_decode_together_as_they_do_alone():
    llama = make_llama(causal=True)
    prompts = [random_ids(n, seed=n).tolist() for n in (3, 12, 1, 30)]
    steps = list(decode(llama, prompts, 25, Sampling(0.0)))
    for row, prompt in enumerate(prompts):
        together = [ids[row] for ids in steps if ids[row] is not None]
        assert together == greedy(llama, prompt, 25)
        assert len(together) > 3


def test_ended_rows_are_not_computed(monkeypatch):
    llama = make_llama(vocab_size=16, scale=1.0, causal=True)  # one token in 8 is a stop
    sizes = []
    forward = llama.hidden_states

    def record(tokens, *args, **kwargs):
        sizes.append(len(tokens))
        return forward(tokens, *args, **kwargs)

    monkeypatch.setattr(llama, "hidden_states", record)
    torch.manual_seed(0)
    steps = list(decode(llama, [[5], [6, 7], [8], [9, 9, 9]], 100, Sampling(1.0)))
    going_on = [sum(token is not None for token in ids) for ids in steps]
    assert sizes == [4, *going_on]
    assert going_on[-1] < 4 and len(steps) < 100
    for row in range(4):  # once ended, ended for good
        ended = [ids[row] is None for ids in steps]
        assert ended == sorted(ended)


@pytest.mark.parametrize("seed", range(6))
def test_rows_that_end_leave_the_others_alone(seed):
    """Each row goes on with its own tokens and its own cache when others are dropped."""
    llama = make_llama(seed=seed, vocab_size=16, scale=3.0, causal=True)
    prompts = [(random_ids(n, seed=seed + n) % 13 + 3).tolist() for n in (3, 9, 1, 6, 2)]
    steps = list(decode(llama, prompts, 30, Sampling(0.0)))
    for row, prompt in enumerate(prompts):
        together = [ids[row] for ids in steps if ids[row] is not None]
        assert together == greedy(llama, prompt, 30)


def test_a_row_whose_context_is_full_ends_with_a_warning_and_others_go_on():
    llama = make_llama(causal=True, max_seq_len=16)
    prompts = [random_ids(12).tolist(), random_ids(3).tolist(), random_ids(16).tolist()]
    with pytest.warns(UserWarning) as warned:
        steps = list(decode(llama, prompts, 50, Sampling(0.0)))
    assert [str(warning.message) for warning in warned] == [
        f"the context of 16 tokens is full; stopped after {n} new tokens" for n in (0, 4, 13)
    ]
    for row, n in enumerate((4, 13, 0)):
        new = [ids[row] for ids in steps if ids[row] is not None]
        assert new == greedy(llama, prompts[row], n)
        assert len(new) == n


def test_a_row_that_ends_long_before_its_context_is_full_costs_others_nothing():
    llama = make_llama(vocab_size=16, scale=1.0, causal=True, max_seq_len=32)
    for seed in range(200):  # until the long row ends by itself and the short one goes on
        torch.manual_seed(seed)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            steps = list(decode(llama, [[5] * 28, [5]], 12, Sampling(1.0)))
        n_long, n_short = (sum(ids[row] is not None for ids in steps) for row in (0, 1))
        if n_long < 3 and n_short > 6:
            assert not caught
            return
    pytest.fail("no such case among the seeds")


def test_prompts_that_do_not_fit_or_are_empty_are_refused():
    llama = make_llama(causal=True, max_seq_len=16)
    with pytest.raises(InputError, match="a prompt of 17 tokens does not fit the context of 16"):
        list(decode(llama, [random_ids(17).tolist()], 5, Sampling()))
    with pytest.raises(InputError, match="a prompt is empty"):
        list(decode(llama, [[1, 5], []], 5, Sampling()))


@pytest.mark.filterwarnings("error")
def test_zero_new_tokens_are_none():
    llama = make_llama(causal=True, max_seq_len=16)
    assert list(decode(llama, [random_ids(16).tolist()], 0, Sampling())) == []
    assert list(decode(llama, [[1]], 0, Sampling())) == []
