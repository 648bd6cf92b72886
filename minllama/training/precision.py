"""Mixed precision, and losses that are not finite."""

import contextlib
import math

import torch
from torch import nn

from minllama.common.errors import InputError


def mixed_precision(device: torch.device, dtype: str) -> contextlib.AbstractContextManager:
    """A context that computes matrix products in `dtype`; "float32" changes nothing.

    Weights, optimizer state, norms and softmax stay in float32.
    """
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def check_finite(losses: torch.Tensor, where: str) -> None:
    """Check that training has not diverged.

    Raises:
        InputError: a loss is not finite.
    """
    for loss in losses.flatten().tolist():
        if not math.isfinite(loss):
            raise InputError(f"the loss is {loss} in {where}; lower --lr, or take other weights")


def clip_gradients(model: nn.Module, max_norm: float, where: str) -> torch.Tensor:
    """Scale the gradients down to a norm, if theirs is larger; return their norm.

    Raises:
        InputError: on a CPU, the norm is not finite.
    """
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    if norm.device.type == "cpu" and not torch.isfinite(norm):
        raise InputError(
            f"the gradient's norm is {norm} in {where}; lower --lr, or take other weights"
        )
    return norm
