"""Which states the head reads, and that batches carry the lengths for it."""

import pytest
import torch
import torch.nn.functional as F
from methods_kit import BATCH, EXAMPLES, TOKENS, predictions

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


def test_unmasked_batches_have_lengths_only_where_they_are_pooled(make_classifier):
    for flags, has_lengths in (({"pooling": "mean"}, True), ({}, False)):
        (batch,) = make_classifier(causal=False, **flags).loader(EXAMPLES, 6)
        assert (batch.lengths is not None) == has_lengths
