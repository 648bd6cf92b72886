"""Cached decoding against whole forward passes; prompts of any length; full contexts."""

import pytest
import torch
from conftest import make_llama

from minllama.common.errors import InputError
from minllama.inference.cache import KVCache
from minllama.inference.decoding import decode
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
        cache = KVCache(llama, batch_size, 48)
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
        cache = KVCache(llama, 3, 40)
        llama.hidden_states(tokens[:, :17], cache=cache)
        cache.lengths = lengths
        for n in (1, 1, 3, 1):
            starts = cache.lengths
            part = torch.stack([row[i : i + n] for row, i in zip(tokens, starts, strict=True)])
            hidden = llama.hidden_states(part, cache=cache)
            for row, start in enumerate(starts):
                alone = llama.hidden_states(tokens[row : row + 1, : start + n])[0, start:]
                assert relative_error(hidden[row], alone) < 1e-5


def test_nothing_is_cached_without_a_mask():
    with pytest.raises(ValueError):
        KVCache(make_llama(), 1, 8)


def greedy(llama, prompt, n):
    """Without cache, token by token."""
    ids = torch.tensor([prompt])
    for _ in range(n):
        with torch.inference_mode():
            token = llama(ids)[0][0, -1].argmax()
        if token in (1, 2):
            break
        ids = torch.cat((ids, token.view(1, 1)), dim=1)
    return ids[0, len(prompt) :].tolist()


def new_tokens(steps, row):
    """Those of one row; None only after its end."""
    ids = [step[row] for step in steps]
    n = sum(token is not None for token in ids)
    assert ids[n:] == [None] * (len(ids) - n)
    return ids[:n]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("vocab_size", [320, 16])
def test_prompts_decode_together_as_they_do_alone(vocab_size, seed):
    """Some rows end early: of 16 tokens one in 8 is a stop id."""
    llama = make_llama(seed=seed, vocab_size=vocab_size, scale=3.0, causal=True)
    prompts = [(random_ids(n, seed=seed + n) % 13 + 3).tolist() for n in (3, 9, 1, 30, 2)]
    steps = list(decode(llama, prompts, 25, Sampling(0.0)))
    for row, prompt in enumerate(prompts):
        assert new_tokens(steps, row) == greedy(llama, prompt, 25)


def test_only_active_rows_are_computed(monkeypatch):
    llama = make_llama(causal=True)
    batch_sizes, forward = [], llama.hidden_states

    def record(tokens, *args, **kwargs):
        batch_sizes.append(len(tokens))
        return forward(tokens, *args, **kwargs)

    monkeypatch.setattr(llama, "hidden_states", record)
    lengths = [1 + 7, 2 + 2, 1 + 9, 3 + 2]  # of each row where it ends
    prompts = [[5], [6, 7], [8], [9, 9, 9]]
    steps = list(
        decode(llama, prompts, 100, Sampling(1.0), (), lambda row, ids: len(ids) == lengths[row])
    )
    assert [len(new_tokens(steps, row)) for row in range(4)] == [7, 2, 9, 2]
    assert batch_sizes == [4] * 2 + [2] * 5 + [1] * 2


def test_a_row_whose_context_is_full_ends_with_a_warning():
    llama = make_llama(causal=True, max_seq_len=16)
    prompts = [random_ids(n).tolist() for n in (12, 3, 16)]
    with pytest.warns(UserWarning) as warned:
        steps = list(decode(llama, prompts, 50, Sampling(0.0)))
    assert len(warned) == 3
    for row, n in enumerate((4, 13, 0)):
        new = new_tokens(steps, row)
        assert new == greedy(llama, prompts[row], n) and len(new) == n


@pytest.mark.parametrize("prompts", [[[5] * 17], [[1, 5], []]], ids=["too long", "empty"])
def test_prompts_that_cannot_be_continued_are_refused(prompts):
    with pytest.raises(InputError):
        list(decode(make_llama(causal=True, max_seq_len=16), prompts, 5, Sampling()))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("prompt", [[5] * 16, [1]])
def test_zero_new_tokens_are_none(prompt):
    assert list(decode(make_llama(causal=True, max_seq_len=16), [prompt], 0, Sampling())) == []
