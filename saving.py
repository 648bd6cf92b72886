"""What fine-tuning saves, and taking it up again."""

import argparse
import random
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

import methods
from base_llama import read_checkpoint, write_checkpoint
from dataset import load_label_names
from tuning import frozen_digest, trained_state
from utils import InputError

# Of what is saved, that which evaluating it and `--load` need.
REQUIRED = {
    "num_labels": int,
    "option": str,
    "pretrained_model_path": str,
    "hidden_dropout_prob": float | int,
}
SAVED_CONFIG = REQUIRED | {"causal": bool | None, "label_names": list | None}
SAVED_ARGS = {
    **dict.fromkeys(("train", "dev", "test", "label_names", "pretrained_model_path"), str),
    "tokenizer_path": str | None,
    "dtype": str,
    "batch_size": int,
    "max_sentence_len": int | None,
}


def save_model(
    model: nn.Module, optimizer: Optimizer, args: Any, config: Any, filepath: str | Path
) -> None:
    """Save weights, optimizer, settings and generator states, as tensors and plain values."""
    kind, keys, *rest = np.random.get_state()
    saved = {
        "model": trained_state(model),
        "frozen": frozen_digest(model),
        "optim": optimizer.state_dict(),
        "args": {name: plain(value) for name, value in vars(args).items()},
        "model_config": {name: plain(value) for name, value in vars(config).items()},
        "system_rng": random.getstate(),
        "numpy_rng": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch_rng": torch.random.get_rng_state(),
    }
    write_checkpoint(saved, filepath)
    print(f"save the model to {filepath}")


def read_saved(path: str | Path) -> dict:
    """What `save_model` saved.

    Raises:
        InputError: it is something else.
    """
    saved = read_checkpoint(path)
    parts = [saved.get(name) for name in ("model", "args", "model_config")]
    if not all(isinstance(part, dict) for part in parts):
        raise InputError(f"{path}: not what --option finetune saves")
    _, args, config = parts
    kinds = [(args, name, kind) for name, kind in SAVED_ARGS.items()]
    kinds += [(config, name, kind) for name, kind in SAVED_CONFIG.items()]
    for name, default in methods.defaults().items():
        if default is not None:
            kind = float | int if isinstance(default, float) else type(default)
            kinds.append((config, name, kind))
    for values, name, kind in kinds:
        if (name in values or name in REQUIRED) and not isinstance(values.get(name), kind):
            value = values.get(name)
            raise InputError(f"{path}: {name} {value!r} is not what --option finetune saves")
    if config["num_labels"] < 1:
        raise InputError(
            f"{path}: {config['num_labels']} labels is not what --option finetune saves"
        )
    return saved


def restore_settings(args: argparse.Namespace, given: frozenset[str]) -> None:
    """Take the settings of the run that saved `args.load`, where the command line has none.

    Raises:
        InputError: the command line has others for what cannot be changed any more.
    """
    checkpoint = read_saved(args.load)
    saved = methods.defaults() | checkpoint["args"]
    saved["causal"] = checkpoint["model_config"].get("causal")
    fixed = {"max_sentence_len", "causal", *methods.defaults()}
    for name in (fixed | SAVED_ARGS.keys()) & saved.keys():
        if name not in given:
            setattr(args, name, saved[name])
        elif name in fixed and getattr(args, name) != saved[name]:
            raise InputError(f"{args.load}: trained with {name} {saved[name]}; leave the flag out")


def same_label_names(args: argparse.Namespace, config: Any) -> list[str]:
    """The names in `args.label_names`.

    Raises:
        InputError: there are more or fewer than labels, or the model was trained with others.
    """
    names = load_label_names(args.label_names)
    if len(names) != config.num_labels or config.label_names not in (None, names):
        known = config.label_names or f"{config.num_labels} labels"
        raise InputError(f"{args.label_names}: {args.load} was trained with {known}")
    return names


def plain(value: Any) -> Any:
    """A value that can be saved without pickling a class; what is none becomes its text."""
    if isinstance(value, np.generic):
        value = value.item()
    return value if type(value) in (bool, int, float, str, list, NoneType) else str(value)
