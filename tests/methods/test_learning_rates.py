"""Learning rates by step and by layer, and stopping early."""

import pytest
from methods_kit import make_training

from minllama.methods.learning_rates import groups_by_depth

pytest_plugins = ["methods_fixtures"]


def test_rates_change_after_every_step_and_keep_the_proportions_of_the_layers(make_classifier):
    flags = {"lr_schedule": "linear", "warmup": 0.25, "layer_decay": 0.5}
    training = make_training(make_classifier(**flags), n_steps=4, lr=0.5)
    (method,) = training.settings.methods
    for step, top in enumerate((0.25, 0.5, 0.5 * 2 / 3, 0.5 / 3, 0)):
        if step > 0:
            method.after_step(training, step)
        rates = [group["lr"] for group in training.optimizer.param_groups]
        assert rates == pytest.approx([top / 8, top / 4, top / 2, top])


def test_rates_go_down_by_layer(make_model):
    model = make_model()
    rates = {
        id(p): group["lr"] for group in groups_by_depth(model, 1.0, 0.5) for p in group["params"]
    }
    assert len(rates) == len(list(model.parameters()))
    expected = {
        "classifier_head": 1,
        "llama.norm": 1,
        "llama.layers.1.": 0.5,
        "llama.layers.0.": 0.25,
    }
    for name, parameter in model.named_parameters():
        rate = next((r for start, r in expected.items() if name.startswith(start)), 0.125)
        assert rates[id(parameter)] == rate, name


def test_patience_counts_from_the_best_epoch(project, run_cli, scripted_dev):
    scripted_dev(0.3, 0.3, 0.5, 0.4, 0.5, 0.4, 0.4)
    flags = [*project.flags, "--epochs", "9", "--patience", "2", "--skip_train_eval"]
    code, out, _ = run_cli("--option", "finetune", *flags)
    assert code == 0
    assert "epoch 4:" in out and "epoch 5:" not in out
    assert "stop: dev has not become better for 2 epochs" in out
