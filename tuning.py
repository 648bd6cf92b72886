"""`--tune`: which tensors of a classifier train, or are put in to be trained (arXiv 2110.04366)."""

import argparse
import hashlib
from typing import Any

import torch
from torch import nn

import adapter
import lora
import prefix
from llama import RMSNorm
from utils import InputError, adder

CHOICES = ("full", "head", "lora", "adapter", "prefix", "norm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = adder(parser.add_argument_group("parameter-efficient tuning"))
    add(
        "--tune",
        choices=CHOICES,
        default="full",
        help="train everything, or besides the new head nothing, low-rank updates, adapters, "
        "a prefix, or the norms' scales",
    )
    for method in (lora, adapter, prefix):
        method.add_arguments(parser)


def adapt(model: nn.Module, config: Any) -> None:
    """Freeze Llama but for what `config.tune` trains, and put that in.

    Args:
        model: a classifier with a `llama`; what it has beside it (a head) trains.
        config: the flags of this module.

    Raises:
        InputError: nothing is left to train.
    """
    if config.tune == "full":
        return
    llama = model.llama
    llama.requires_grad_(False)
    trained: list[nn.Parameter] = []
    if config.tune == "lora":
        trained = lora.add_lora(llama, config.lora_rank, config.lora_alpha, config.lora_dropout)
    elif config.tune == "adapter":
        trained = adapter.add_adapters(llama, config.adapter_size)
    elif config.tune == "prefix":
        trained = prefix.add_prefix(llama, config.prefix_length)
    elif config.tune == "norm":
        trained = [norm.weight for norm in llama.modules() if isinstance(norm, RMSNorm)]
    for parameter in trained:
        parameter.requires_grad_()
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"--tune {config.tune}: nothing to train; --prompt_based has no new head")


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """What has to be saved of a model: all of it, or where some is frozen, the trained tensors."""
    parameters = dict(model.named_parameters())
    if all(parameter.requires_grad for parameter in parameters.values()):
        return model.state_dict()
    return {name: p.detach() for name, p in parameters.items() if p.requires_grad}


def load_trained(model: nn.Module, saved: dict[str, torch.Tensor], path: str) -> None:
    """Load what `trained_state` gave into a model that was built and adapted alike.

    Raises:
        InputError: these are not its trained tensors.
    """
    expected = trained_state(model)
    if saved.keys() != expected.keys() or not all(
        isinstance(saved[name], torch.Tensor) and saved[name].shape == tensor.shape
        for name, tensor in expected.items()
    ):
        raise InputError(f"{path}: its tensors are not those that its settings describe")
    for name, tensor in saved.items():
        if not tensor.isfinite().all():
            raise InputError(f"{path}: {name} has values that are not finite")
    model.load_state_dict(saved, strict=False)


def frozen_digest(model: nn.Module) -> str:
    """SHA-256 of the tensors that do not train, to know their base again by."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            digest.update(parameter.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """How many numbers train, and how many there are."""
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return trained, sum(p.numel() for p in parameters)
