"""Prompt-based fine-tuning against scores without a cache; few-shot draws."""

import pytest
import torch
import torch.nn.functional as F
from methods_kit import BATCH, NAMES

from minllama.methods.classify import build
from minllama.methods.settings import FinetuneSettings

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


def test_few_prompts_are_drawn_with_the_seed_and_made_with_the_template(project):
    flags = {"shots": 2, "seed": 7, "prompt_based": True, "batch_size": 12}
    flags |= {"prompt_template": "{sentence} So it is", "train": "data/toy-train.txt"}
    flags |= {"dev": "data/toy-dev.txt", "test": "data/toy-test.txt"}
    flags |= {"label_names": "data/toy-label-mapping.json", "pretrained_model_path": "model.pt"}
    drawn = []
    for seed in (7, 7, 8):
        settings = FinetuneSettings.from_flags(flags | {"option": "finetune", "seed": seed})
        classifier, (train, dev, _) = build(settings.resolved())
        drawn.append(train)
        assert sorted(example.label for example in train) == [0, 0, 1, 1, 2, 2]
        assert len(dev) == 6
        for sentence, _, ids in train + dev:
            assert sentence.endswith(". So it is")
            assert ids == classifier.tokenizer.encode(sentence, bos=True, eos=False)
    assert drawn[0] == drawn[1]
