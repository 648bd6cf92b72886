"""Learning rates that differ by step and by layer, and when to stop early."""

import argparse

from torch import nn

from recipe import Recipe
from training import warmup_decay
from utils import InputError, adder, number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = adder(parser.add_argument_group("learning rate and stopping"))
    help = "whether and how --lr goes down to 0 over the training"
    add("--lr_schedule", choices=("constant", "linear", "cosine"), default="constant", help=help)
    help = "share of the steps in which --lr is reached"
    add("--warmup", type=number(float, 0, 1), default=0.0, metavar="SHARE", help=help)
    help = "each layer's learning rate as a fraction of that of the layer above it"
    add("--layer_decay", type=number(float, 0, 1), default=1.0, metavar="FRACTION", help=help)
    help = "stop when dev has not become better for so many epochs"
    add("--patience", type=number(int, 1), metavar="EPOCHS", help=help)


def prepare(recipe: Recipe) -> None:
    """Group the parameters by depth, and set the rates before every step.

    Raises:
        InputError: there is one depth only.
    """
    args = recipe.args
    if args.layer_decay != 1:
        recipe.groups = groups_by_depth(recipe.model, float(args.lr), args.layer_decay)
        if len(recipe.groups) == 1:
            raise InputError(f"--layer_decay: all that --tune {args.tune} trains is in one layer")
    if args.lr_schedule == "constant" and args.warmup == 0:
        return
    for group in recipe.groups:
        group["initial_lr"] = group["lr"]
    n_warmup = round(args.warmup * recipe.n_steps)

    def set_rates(_model: nn.Module | None, step: int) -> None:
        factor = warmup_decay(step, recipe.n_steps, n_warmup, args.lr_schedule)
        for group in recipe.groups:
            group["lr"] = group["initial_lr"] * factor

    set_rates(None, 0)
    recipe.after_step.append(set_rates)


def groups_by_depth(model: nn.Module, lr: float, decay: float) -> list[dict]:
    """Parameters with rates lr · decay^(distance from the top) (arXiv 1801.06146, section 3.2).

    At the top are the new head and the last norm, below them the layers, then the embeddings.
    """
    n_layers = len(model.llama.layers)
    groups: dict[int, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(depth(name, n_layers), []).append(parameter)
    return [
        {"params": parameters, "lr": lr * decay ** (n_layers + 1 - at)}
        for at, parameters in sorted(groups.items())
    ]


def depth(name: str, n_layers: int) -> int:
    """0 for the embeddings, 1 for the first layer, `n_layers` + 1 for what comes after the last."""
    if name.startswith("llama.tok_embeddings."):
        return 0
    if name.startswith("llama.layers."):
        return 1 + int(name.split(".")[2])
    return n_layers + 1
