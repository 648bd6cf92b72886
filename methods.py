"""The optional methods, as a table: the flags that they declare, and those that change training."""

import argparse
import hashlib
import re
from typing import Any

import calibration
import mixout
import pooling
import prompt_based
import prompts
import schedule
import smart
import tuning
import wise_ft
from recipe import Recipe
from utils import declared

METHODS = (wise_ft, mixout, schedule, smart)  # in the order in which they prepare the training
MODULES = (prompts, calibration, prompt_based, tuning, pooling, *METHODS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for module in MODULES:
        module.add_arguments(parser)


def defaults() -> dict[str, Any]:
    """The methods' flags, all of them off."""
    return declared(add_arguments)


def acting_with() -> dict[str, dict[str, Any]]:
    """For each flag of the methods, those of which one must be set for it to act, and to what.

    A flag is set to one of the values given, or where these are None, to anything but nothing.
    """
    needed = {
        "prompt_template": {"option": ("prompt",), "prompt_based": None},
        "calibrate": {"option": ("prompt",)},
        "adapter_size": {"tune": ("adapter",)},
        "prefix_length": {"tune": ("prefix",)},
    }
    for name in defaults():
        needed.setdefault(name, {"option": ("finetune",)})
        if name.startswith("lora_"):
            needed[name] = {"tune": ("lora",)}
        if name.startswith("smart_"):
            needed[name] = {"smart": None}
    return needed


def chosen(args: argparse.Namespace) -> dict[str, Any]:
    """The methods' flags that are not at their defaults."""
    return {
        name: getattr(args, name)
        for name, default in defaults().items()
        if getattr(args, name) != default
    }


def need_label_names(args: argparse.Namespace) -> bool:
    """Whether a method reads the labels' names."""
    return args.prompt_based or args.wise_ft is not None


def file_suffix(args: argparse.Namespace) -> str:
    """The methods that are on, for a file's name: "-tune-lora" where that is the only one.

    Where it would become long, a digest stands for all of them.
    """
    parts = (name if value is True else f"{name}-{value}" for name, value in chosen(args).items())
    suffix = "".join(f"-{part}" for part in parts)
    if len(suffix) > 100 or not re.fullmatch(r"[\w.-]*", suffix):
        return f"-methods-{hashlib.sha256(suffix.encode()).hexdigest()[:8]}"
    return suffix


def prepare(recipe: Recipe) -> None:
    for method in METHODS:
        method.prepare(recipe)


def out_file_kinds(args: argparse.Namespace, kind: str) -> list[str]:
    """What the names of files of predictions may tell: the option's kind and, where a method is
    on or the weights are not the assignment's, "advanced".
    """
    own_weights = "pretrained_model_path" in args.given or args.load is not None
    return [kind, "advanced"] if chosen(args) or own_weights else [kind]
