"""Learning rates by step and by layer, and stopping early."""

import pytest
from methods_kit import make_training

from minllama.methods.learning_rates import groups_by_depth
from minllama.training.schedule import learning_rate

pytest_plugins = ["methods_fixtures"]


def test_warmup_and_decay():
    rates = [learning_rate(step, 10, 3, 1.0, schedule="linear") for step in range(11)]
    assert rates == pytest.approx(
        [1 / 4, 2 / 4, 3 / 4, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7, 0]
    )
    assert learning_rate(5, 10, 0, 1.0, schedule="cosine") == pytest.approx(0.5)
    assert [learning_rate(step, 10, 0, 1.0, schedule="constant") for step in range(3)] == [1, 1, 1]


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
