"""Fixtures for the tests of methods; a test module asks for them by `pytest_plugins`.

A conftest.py here would take the place of tests/conftest.py for all that import it by its name.
"""

import pytest
import torch
from conftest import make_llama, save_llama
from methods_kit import NAMES, methods_of

from minllama.methods import classify
from minllama.methods.saved import ClassifierConfig
from minllama.methods.settings import FinetuneSettings


@pytest.fixture
def make_classifier(tmp_path, tokenizer_path):
    """Makes the same classifier each time, with methods as the flags say."""

    def make(causal=True, hidden_dropout_prob=0.0, **flags) -> classify.Classifier:
        config = ClassifierConfig(
            pretrained_model_path=str(save_llama(make_llama(scale=3.0), tmp_path / "m.pt")),
            num_labels=3,
            option="finetune",
            hidden_dropout_prob=hidden_dropout_prob,
            causal=causal,
            label_names=NAMES,
            methods=methods_of(flags),
        )
        settings = FinetuneSettings(option="finetune", tokenizer_path=str(tokenizer_path))
        torch.manual_seed(2)
        return classify.make_classifier(settings, config)

    return make


@pytest.fixture
def make_model(make_classifier):
    """Makes the model of such a classifier."""
    return lambda **flags: make_classifier(**flags).model


@pytest.fixture
def scripted_dev(monkeypatch):
    """Scripts the accuracies on dev that training sees first; all else is evaluated."""

    def script(*accuracies: float) -> None:
        left, evaluate = list(accuracies), classify.Classifier.evaluate

        def scripted(self, loader):
            result = evaluate(self, loader)
            is_dev = len(loader.dataset) == 6 and left
            return result._replace(accuracy=left.pop(0)) if is_dev else result

        monkeypatch.setattr(classify.Classifier, "evaluate", scripted)

    return script
