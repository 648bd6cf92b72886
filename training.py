"""What fine-tuning and pre-training share: a step of the optimizer, precision, memory."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from utils import InputError

Loss = Callable[[Any, nn.Module], torch.Tensor]  # of a batch and a model, a scalar


def update(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Loss,
    optimizer: Optimizer,
    when: str,
    max_norm: float | None = None,
) -> float:
    """One step of the optimizer, down the mean loss of some batches, one backward pass for each.

    Args:
        when: the step's name, for the error.
        max_norm: the gradient is scaled down to this norm, if it is longer.

    Returns:
        the mean loss.

    Raises:
        InputError: a loss or the gradient is not finite; the weights are left as they were.
    """
    optimizer.zero_grad()
    total = 0.0
    for batch in batches:
        value = loss(batch, model) / len(batches)
        total += value.item()
        if not math.isfinite(total):
            raise InputError(f"the loss is {value} in {when}; lower --lr")
        value.backward()
    if max_norm is not None:
        norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        if not torch.isfinite(norm):
            raise InputError(f"the gradient's norm is {norm} in {when}; lower --lr")
    optimizer.step()
    return total


def mixed_precision(device: torch.device, dtype: str) -> torch.autocast:
    """A context in which products are computed in `dtype`; "float32" changes nothing.

    Weights, optimizer state, norms and softmax stay in float32.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def checkpoint_activations(layers: nn.ModuleList) -> None:
    """Keep only the layers' inputs for the backward pass, and compute the rest again in it.

    Less memory for one more forward pass (arXiv 1604.06174); the results are the same.
    """
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
