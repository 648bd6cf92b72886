"""The optional methods, as a table: the flags that they declare, and those that change training."""

import argparse
from typing import Any

import calibration
import mixout
import prompt_based
import prompts
import schedule
import smart
import tuning
import wise_ft
from recipe import Recipe

METHODS = (wise_ft, mixout, schedule, smart)  # in the order in which they prepare the training
MODULES = (prompts, calibration, prompt_based, tuning, *METHODS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for module in MODULES:
        module.add_arguments(parser)
    group = parser.add_argument_group("pooling")
    help = "what of a sentence the new head sees: its last token's state, or the mean of all; by "
    help += "default the last column's, as the assignment has it, or with --causal the last token's"
    group.add_argument("--pooling", choices=("last", "mean"), help=help)


def defaults() -> dict[str, Any]:
    """The methods' flags, all of them off."""
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    return vars(parser.parse_args([]))


def chosen(args: argparse.Namespace) -> dict[str, Any]:
    """The methods' flags that are not at their defaults."""
    return {
        name: getattr(args, name)
        for name, default in defaults().items()
        if getattr(args, name) != default
    }


def prepare(recipe: Recipe) -> None:
    for method in METHODS:
        method.prepare(recipe)


def out_file_kinds(args: argparse.Namespace, kind: str) -> list[str]:
    """What the names of files of predictions may tell: the option's kind and, where a method is
    on or the weights are not the assignment's, "advanced".
    """
    own_weights = "pretrained_model_path" in args.given
    return [kind, "advanced"] if chosen(args) or own_weights else [kind]
