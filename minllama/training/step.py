"""A step of the optimizer, its precision, compiled layers, and the learning rate."""

import contextlib
import math
import os
import shutil
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer

from minllama.common.errors import InputError, explain_out_of_memory
from minllama.training import distributed


def update(
    model: nn.Module,
    losses: Iterable[torch.Tensor],
    optimizer: Optimizer,
    when: str,
    max_norm: float | None = None,
) -> torch.Tensor:
    """One step of the optimizer, down the sum of some losses.

    Args:
        losses: scalars, made one after the other: a loss is asked for when the one before it has
            gone backward, so that the activations of one batch are in memory at a time. With
            several processes each has its share of the sum.
        when: the step's name, for the error.
        max_norm: the gradient is scaled down to this norm, if it is longer.

    Returns:
        the sum of the losses, a scalar on its device. On a GPU, which nothing here waits for, it is
        nan where the gradient's norm was not finite; see `check_finite`.

    Raises:
        InputError: on a CPU, the loss is not finite, or the gradient that `max_norm` measures; the
            weights are left as they were.
    """
    optimizer.zero_grad()
    sums = []
    with explain_out_of_memory(f"training, {when}"):
        for loss in losses:
            (loss * distributed.n_processes()).backward()  # the engine takes the processes' mean
            sums.append(loss.detach())
    total = distributed.total(torch.stack(sums).sum())
    on_cpu = total.device.type == "cpu"
    if on_cpu:
        check_finite(total, when)
    if max_norm is not None:
        norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if on_cpu and not torch.isfinite(norm):
            raise InputError(f"the gradient's norm is {norm} in {when}; lower --lr")
        total = torch.where(torch.isfinite(norm), total, torch.nan)
    with explain_out_of_memory(f"the optimizer took {when}"):
        optimizer.step()
    return total


def check_finite(losses: torch.Tensor, when: str) -> None:
    """See that training has not diverged.

    Raises:
        InputError: a loss is not finite.
    """
    for loss in losses.flatten().tolist():
        if not math.isfinite(loss):
            raise InputError(f"the loss is {loss} in {when}; lower --lr")


def compile_layers(layers: nn.ModuleList) -> None:
    """Let torch.compile make one kernel of what a layer does between its products.

    Raises:
        InputError: there is no C++ compiler, which it needs on a CPU.
    """
    on_cpu = next(layers.parameters()).device.type == "cpu"
    if on_cpu and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise InputError("--compile: there is no C++ compiler here; install g++, or leave it out")
    for layer in layers:
        layer.compile()


def mixed_precision(device: torch.device, dtype: str) -> contextlib.AbstractContextManager:
    """A context in which products are computed in `dtype`; "float32" changes nothing.

    Weights, optimizer state, norms and softmax stay in float32.
    """
    check_dtype(dtype)
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def check_dtype(dtype: str) -> None:
    """See that there is training in this dtype.

    Raises:
        InputError: there is not.
    """
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"--dtype {dtype}: training is in float32 or bfloat16")


def learning_rate(
    step: int,
    n_steps: int,
    n_warmup: int,
    highest: float,
    lowest: float = 0.0,
    schedule: str = "cosine",
) -> float:
    """The rate of a step: a linear warm-up to the highest, then a decay to the lowest, or none.

    Args:
        step: the number of steps taken before.
        schedule: "constant", "linear" or "cosine" (arXiv 1608.03983, equation 5).
    """
    if step < n_warmup:
        return highest * (step + 1) / (n_warmup + 1)
    progress = (step - n_warmup) / max(1, n_steps - n_warmup)
    fraction = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
    }[schedule]
    return lowest + (highest - lowest) * fraction
