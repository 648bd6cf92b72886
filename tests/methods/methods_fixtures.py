"""Fixtures for the tests of methods; a test module asks for them by `pytest_plugins`.

A conftest.py here would take the place of tests/conftest.py for all that import it by its name.
"""

from types import SimpleNamespace

import pytest
import torch
from conftest import make_llama, save_llama
from methods_kit import NAMES, methods_of

import minllama.tasks.finetune
from minllama import methods
from minllama.methods.saved import ClassifierConfig


@pytest.fixture
def make_model(tmp_path, tokenizer):
    """Makes the same classifier each time, with methods as the flags say."""

    def make(causal=True, hidden_dropout_prob=0.0, **flags):
        config = ClassifierConfig(
            pretrained_model_path=save_llama(make_llama(scale=3.0), tmp_path / "m.pt"),
            num_labels=3,
            option="finetune",
            hidden_dropout_prob=hidden_dropout_prob,
            causal=causal,
            label_names=NAMES,
        )
        torch.manual_seed(2)
        return methods.build_classifier(config, methods_of(flags), tokenizer)

    return make


@pytest.fixture
def trained(project, run_cli, monkeypatch):
    """What the loop gets from flags: its arguments, as `train_epoch` names them."""
    calls = []
    train_epoch = minllama.tasks.finetune.train_epoch

    def recorded(model, loader, optimizer, loss, epoch, grad_accum, after_step, **more):
        calls.append(
            SimpleNamespace(
                model=model,
                batch=next(iter(loader)),
                groups=optimizer.param_groups,
                rates=[group["lr"] for group in optimizer.param_groups],
                loss=loss,
                after_step=after_step,
            )
        )
        return train_epoch(model, loader, optimizer, loss, epoch, grad_accum, after_step, **more)

    monkeypatch.setattr(minllama.tasks.finetune, "train_epoch", recorded)

    def run(*flags):
        calls.clear()
        code, _, err = run_cli("--option", "finetune", *project.flags, "--lr", "1e-3", *flags)
        assert code == 0, err
        return calls[0]

    return run


@pytest.fixture
def fake_dev(monkeypatch):
    """Lets training see given accuracies on dev, one after the other, and then the real ones."""
    model_eval = minllama.tasks.finetune.model_eval

    def fake(*accuracies):
        left = list(accuracies)

        def evaluate(loader, *args):
            accuracy, *rest = model_eval(loader, *args)
            is_dev = len(loader.dataset) == 6
            return (left.pop(0) if is_dev and left else accuracy, *rest)

        monkeypatch.setattr(minllama.tasks.finetune, "model_eval", evaluate)

    return fake
