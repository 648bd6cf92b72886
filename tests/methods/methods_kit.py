"""What the tests of several methods share: a small model, a batch, and training in a few lines."""

import re
from types import SimpleNamespace

import torch

from minllama import methods
from minllama.methods.recipe import Recipe
from minllama.tasks.epoch import ClassificationLoss, train_epoch
from minllama.text.batches import Batch
from optimizer import AdamW

CPU = torch.device("cpu")
NAMES = ["bad", "fair enough", "good"]
NAME_IDS = {"bad": [5], "fair enough": [6, 7], "good": [8]}
TOKENS = torch.randint(3, 320, (6, 11), generator=torch.Generator().manual_seed(1))
BATCH = Batch(
    token_ids=TOKENS,
    labels=torch.tensor([0, 1, 2, 0, 1, 2]),
    sents=[],
    lengths=torch.tensor([11, 10, 7, 11, 5, 8]),
)


def methods_of(flags):
    """The methods that flags turn on; a flag that no method has is a mistake in the test."""
    assert flags.keys() <= methods.values_of(()).keys(), flags
    return methods.switched_on(flags)


def make_recipe(model, n_steps=3, lr=1e-2, **flags):
    """Plain fine-tuning, and what the methods that flags turn on make of it."""
    recipe = Recipe(
        model=model,
        label_names=NAMES,
        tokenizer=SimpleNamespace(encode=lambda name, **_: NAME_IDS[name]),
        loss=ClassificationLoss(batch_size=6, device=CPU, dtype="float32"),
        groups=[{"params": [p for p in model.parameters() if p.requires_grad], "lr": lr}],
        batch_size=6,
        n_steps=n_steps,
        evaluate=lambda: 0.0,
    )
    for method in methods_of(flags):
        method.prepare(recipe)
    return recipe


def train(model, n_steps=3, **flags):
    """Some steps on one batch; returns the losses."""
    recipe = make_recipe(model, n_steps, **flags)
    optimizer = AdamW(recipe.groups, lr=1e-2)
    return [
        train_epoch(model, [BATCH], optimizer, recipe.loss, step, 1, recipe.after_step)
        for step in range(n_steps)
    ]


@torch.no_grad()
def predictions(model):
    return model.eval()(BATCH.token_ids, BATCH.lengths)


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def saved_file(project):
    """What fine-tuning saved, the only one there."""
    (path,) = project.path.glob("finetune-*.pt")
    return path.name


def is_one_line(err):
    """Whether standard error is a user's error, and nothing else."""
    return re.fullmatch(r"error: .+\n", err) is not None
