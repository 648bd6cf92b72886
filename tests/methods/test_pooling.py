"""Which states the head reads, and that batches carry the lengths for it."""

import pytest
import torch
import torch.nn.functional as F
from methods_kit import BATCH, TOKENS, predictions

pytest_plugins = ["methods_fixtures"]


@pytest.mark.parametrize("causal", [False, True])
def test_pooling_reads_real_tokens_only(make_model, causal):
    hidden = make_model(causal=causal).llama.hidden_states(TOKENS)
    for pooling in ("last", "mean"):
        model = make_model(pooling=pooling, causal=causal)
        rows = [h[:n] for h, n in zip(hidden, BATCH.lengths.tolist(), strict=True)]
        pooled = torch.stack([row[-1] if pooling == "last" else row.mean(0) for row in rows])
        expected = F.log_softmax(model.classifier_head(pooled), dim=-1)
        assert torch.allclose(predictions(model), expected, atol=1e-5)


def test_unmasked_rows_are_pooled_by_their_lengths(trained):
    assert trained("--no-causal", "--pooling", "mean").batch.lengths is not None
    assert trained("--no-causal").batch.lengths is None
