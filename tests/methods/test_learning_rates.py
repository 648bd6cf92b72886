"""Learning rates by step and by layer, and stopping early."""

import pytest
from methods_kit import BATCH, make_recipe

from minllama.methods.learning_rates import groups_by_depth
from minllama.tasks.epoch import train_epoch
from minllama.training.step import learning_rate
from optimizer import AdamW

pytest_plugins = ["methods_fixtures"]


def test_warmup_and_decay():
    rates = [learning_rate(step, 10, 3, 1.0, schedule="linear") for step in range(11)]
    assert rates == pytest.approx(
        [1 / 4, 2 / 4, 3 / 4, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7, 0]
    )
    assert learning_rate(5, 10, 0, 1.0, schedule="cosine") == pytest.approx(0.5)
    assert [learning_rate(step, 10, 0, 1.0, schedule="constant") for step in range(3)] == [1, 1, 1]


def test_the_rates_are_set_before_every_step(make_model):
    model = make_model()
    recipe = make_recipe(model, 4, lr_schedule="linear", warmup=0.25, lr=0.5)
    optimizer, rates = AdamW(recipe.groups, lr=0.5), []
    step = optimizer.step
    optimizer.step = lambda: (rates.append(optimizer.param_groups[0]["lr"]), step())
    for epoch in range(2):
        train_epoch(model, [BATCH, BATCH], optimizer, recipe.loss, epoch, 1, recipe.after_step)
    assert rates == pytest.approx([0.25, 0.5, 0.5 * 2 / 3, 0.5 / 3])


def test_a_schedule_keeps_the_proportions_of_the_layers(make_model):
    recipe = make_recipe(make_model(), 4, lr_schedule="cosine", layer_decay=0.5, lr=1.0)
    (after_step,) = recipe.after_step
    assert [group["lr"] for group in recipe.groups] == pytest.approx([1 / 8, 1 / 4, 1 / 2, 1])
    after_step(recipe.model, 2)
    assert [group["lr"] for group in recipe.groups] == pytest.approx([1 / 16, 1 / 8, 1 / 4, 1 / 2])


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


def test_schedules_reach_the_loop(trained):
    call = trained("--lr_schedule", "linear", "--warmup", "0.5", "--grad_accum", "2")
    assert call.rates == pytest.approx([5e-4])  # on the way up, in the first of two steps
    assert call.groups[0]["lr"] == 0  # 3 batches were 2 steps, and 2 were expected
    call = trained("--layer_decay", "0.5")
    assert call.rates == pytest.approx([1e-3 / 8, 1e-3 / 4, 1e-3 / 2, 1e-3])


def test_patience_counts_from_the_best_epoch(project, run_cli, fake_dev):
    fake_dev(0.3, 0.3, 0.5, 0.4, 0.5, 0.4, 0.4)
    flags = ["--option", "finetune", *project.flags, "--epochs", "9", "--patience", "2"]
    code, out, _ = run_cli(*flags)
    assert code == 0
    assert "epoch 4:" in out and "epoch 5:" not in out
    assert "stop: dev has not become better for 2 epochs" in out
