"""Temperature, filters and penalty, against their definitions."""

import pytest
import torch
from conftest import make_llama

from minllama.inference.sampling import Sampling, nucleus

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0, -2.0], [0.0, 3.0, -1.0, 2.9, 1.0]])


def candidates(sampling: Sampling) -> list[set[int]]:
    """The tokens that each row draws in 400 draws."""
    torch.manual_seed(0)
    ids = torch.cat([sampling(LOGITS, ((), ())) for _ in range(400)], dim=1)
    return [set(row) for row in ids.tolist()]


@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_top_k_leaves_the_k_likeliest(k):
    order = [[0, 1, 2, 3, 4], [1, 3, 4, 0, 2]]
    assert candidates(Sampling(5.0, top_k=k)) == [set(row[:k]) for row in order]


def test_top_p_leaves_the_least_likeliest_that_reach_it():
    probabilities = torch.tensor([[0.1, 0.5, 0.4], [0.3, 0.3, 0.4]])
    for top_p, expected in (
        (0.0, [[0, 0.5, 0], [0, 0, 0.4]]),
        (0.45, [[0, 0.5, 0], [0.3, 0, 0.4]]),
        (0.6, [[0, 0.5, 0.4], [0.3, 0, 0.4]]),
        (0.95, [[0.1, 0.5, 0.4], [0.3, 0.3, 0.4]]),
    ):
        kept = nucleus(probabilities, top_p)
        assert kept.sum() > 0 and torch.allclose(kept, torch.tensor(expected)), top_p


def test_what_a_row_has_is_less_likely_by_the_penalty():
    """Each row for itself, whatever the sign of the logit."""
    penalty = Sampling(0.0, repetition_penalty=2.0)
    assert penalty(LOGITS, ([0], [1, 3])).tolist() == [[0], [1]]  # 1 and 1; 1.5, 1.45 and 1
    assert penalty(LOGITS, ([0, 0, 0], [1])).tolist() == [[0], [3]]
    assert Sampling(0.0, repetition_penalty=2.1)(LOGITS, ([0], [1])).tolist() == [[1], [3]]
    only = torch.tensor([[-1.0, -1.5]])
    assert penalty(only, [[0]]).tolist() == [[1]]


@pytest.mark.parametrize("causal", [True, False])
def test_generate_takes_them_all(causal):
    llama = make_llama(causal=causal)
    prompt = torch.tensor([[1, 5, 9], [1, 7, 7]])
    with torch.inference_mode():
        greedy = llama.generate(prompt, 6, 0.0)
        assert torch.equal(llama.generate(prompt, 6, 2.0, top_k=1), greedy)
        assert torch.equal(llama.generate(prompt, 6, 2.0, top_p=0.0), greedy)
        for row in llama.generate(prompt, 12, 0.0, repetition_penalty=1e9).tolist():
            assert len(set(row[3:])) == len(row[3:])
        if causal:
            stop = int(greedy[0, 4])
            assert stop not in llama.generate(prompt, 6, 0.0, stop_ids=[stop])[0, 3:].tolist()


def test_top_k_takes_no_more_where_logits_tie():
    logits = torch.zeros(1, 50)
    drawn = {int(Sampling(1.0, top_k=2)(logits, [[]])) for _ in range(100)}
    assert len(drawn) == 2


@pytest.mark.parametrize("temperature", [1e-5, 1e-29, 1e-42])
def test_a_tiny_temperature_takes_the_likeliest(temperature):
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) * 1000
    ids = Sampling(temperature)(logits, [[]] * 3)
    assert torch.equal(ids, logits.argmax(-1, keepdim=True))
