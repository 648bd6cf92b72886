"""Prompt-based fine-tuning against scores without a cache."""

import pytest
import torch
import torch.nn.functional as F
from methods_kit import BATCH, NAMES

pytest_plugins = ["methods_fixtures"]


def test_prompt_based_gradients_are_those_without_a_cache(make_model, tokenizer):
    """Each label's tokens appended to each prompt, alone in a batch."""
    model = make_model(prompt_based=True)
    value = F.nll_loss(model(BATCH.token_ids, BATCH.lengths), BATCH.labels)
    ours = torch.autograd.grad(value, list(model.llama.parameters()))
    rows = []
    for prompt, length in zip(BATCH.token_ids.tolist(), BATCH.lengths.tolist(), strict=True):
        scores = []
        for name in NAMES:
            ids = tokenizer.encode(name, bos=False, eos=False)
            tokens = torch.tensor([prompt[:length] + ids])
            log_probs = model.llama(tokens, targets=tokens)[0][0].log_softmax(-1)
            scores.append(sum(log_probs[length + i - 1, token] for i, token in enumerate(ids)))
        rows.append(torch.stack(scores))
    other = F.cross_entropy(torch.stack(rows), BATCH.labels)
    assert value.item() == pytest.approx(other.item(), abs=1e-4)
    for a, b in zip(ours, torch.autograd.grad(other, list(model.llama.parameters())), strict=True):
        assert torch.allclose(a, b, atol=1e-3 * b.abs().max().item() + 1e-5)
