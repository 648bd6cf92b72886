"""The two classifiers against the model's own logits and states, unmasked and causal."""

from types import SimpleNamespace

import pytest
import torch
from conftest import make_llama, save_llama

from classifier import LlamaEmbeddingClassifier, LlamaZeroShotClassifier
from minllama.common.errors import InputError

ROWS = [[1, 40, 50, 60, 70], [1, 80, 90]]
PADDED = torch.tensor([ROWS[0], ROWS[1] + [3, 3]])
LENGTHS = torch.tensor([5, 3])


@pytest.fixture
def config(tmp_path):
    path = save_llama(make_llama(), tmp_path / "model.pt")
    return SimpleNamespace(
        pretrained_model_path=str(path), num_labels=3, option="finetune", hidden_dropout_prob=0.5
    )


NAMES = ["bad", "so so , perhaps", "good"]  # of several tokens, and of different numbers of them


def test_zero_shot_unmasked_sums_over_the_last_column(config, tokenizer):
    model = LlamaZeroShotClassifier(config, tokenizer, NAMES).eval()
    assert not any(p.requires_grad for p in model.parameters())
    with torch.inference_mode():
        scores = model(PADDED)
        log_probs = model.llama(PADDED)[0][:, 0].double().log_softmax(-1)
    for i, name in enumerate(NAMES):
        ids = tokenizer.encode(name, bos=False, eos=False)
        expected = sum(log_probs[:, token] for token in ids)
        assert torch.allclose(scores[:, i].double(), expected, atol=1e-4)


@pytest.mark.parametrize("labels", [None, [[5], [6], [8]]])
def test_zero_shot_causal_is_the_log_probability_of_the_whole_label(config, tokenizer, labels):
    """Labels of one token need no cache, which would slow prompt-based training down by a third."""
    config.causal = True
    model = LlamaZeroShotClassifier(config, tokenizer, NAMES).eval()
    model.label_name_ids = labels or model.label_name_ids
    assert model.uses_cache == (labels is None)
    with torch.inference_mode():
        scores = model(PADDED, LENGTHS)
        for i, label in enumerate(model.label_name_ids):
            for r, row in enumerate(ROWS):
                tokens = torch.tensor([row + label])
                logits, _ = model.llama(tokens, targets=tokens)
                log_probs = logits[0].double().log_softmax(-1)
                expected = sum(log_probs[len(row) - 1 + j, t] for j, t in enumerate(label))
                assert scores[r, i].item() == pytest.approx(expected.item(), abs=1e-3)


def test_zero_shot_needs_a_name_for_every_label(config, tokenizer):
    with pytest.raises(InputError, match="2 label names for 3 labels"):
        LlamaZeroShotClassifier(config, tokenizer, ["bad", "good"])


def test_embedding_classifier_reads_the_last_column_or_each_rows_own_last_token(config):
    unmasked = LlamaEmbeddingClassifier(config).eval()
    config.causal = True
    causal = LlamaEmbeddingClassifier(config).eval()
    with torch.inference_mode():
        for model, lengths, positions in (
            (unmasked, None, [4, 4]),
            (causal, LENGTHS, [4, 2]),
        ):
            hidden = model.llama.hidden_states(PADDED)
            last = torch.stack([hidden[row, position] for row, position in enumerate(positions)])
            head = model.classifier_head
            expected = (last @ head.weight.T + head.bias).log_softmax(-1)
            assert torch.allclose(model(PADDED, lengths), expected, atol=1e-6)


def test_dropout_before_the_head_acts_in_training_only(config):
    model = LlamaEmbeddingClassifier(config)
    with torch.inference_mode():
        model.eval()
        assert torch.equal(model(PADDED), model(PADDED))
        model.train()
        assert not torch.equal(model(PADDED), model(PADDED))


@pytest.mark.parametrize(("option", "trains"), [("finetune", True), ("pretrain", False)])
def test_option_says_whether_llama_trains(config, option, trains):
    config.option = option
    model = LlamaEmbeddingClassifier(config)
    model(PADDED).sum().backward()
    assert model.classifier_head.weight.grad is not None
    assert all((p.grad is not None) == trains for p in model.llama.parameters())
