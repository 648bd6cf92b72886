"""What fine-tuning and pre-training share: a step of the optimizer, precision, memory."""

import contextlib
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
    n: int | None = None,
) -> float:
    """One step of the optimizer, down the mean loss of some batches, one backward pass for each.

    Args:
        when: the step's name, for the error.
        max_norm: the gradient is scaled down to this norm, if it is longer.
        n: what the sum of the losses is divided by, if not by the number of batches.

    Returns:
        the mean loss.

    Raises:
        InputError: a loss is not finite, or the gradient that `max_norm` measures; the weights are
            left as they were.
    """
    n = n or len(batches)
    optimizer.zero_grad()
    total = 0.0
    for batch in batches:
        value = loss(batch, model) / n
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


def checkpoint_activations(layers: nn.ModuleList) -> None:
    """Keep only the layers' inputs for the backward pass, and compute the rest again in it.

    Less memory for one more forward pass (arXiv 1604.06174); the results are the same.
    """

    def in_mode(layer: nn.Module, forward: Callable, training: bool, *args, **kwargs) -> Any:
        before = layer.training
        layer.train(training)
        try:
            return forward(*args, **kwargs)
        finally:
            layer.train(before)

    def checkpointed(layer: nn.Module, forward: Callable, *args, **kwargs) -> Any:
        again = functools.partial(in_mode, layer, forward, layer.training)
        return checkpoint(again, *args, use_reentrant=False, **kwargs)

    for layer in layers:
        layer.forward = functools.partial(checkpointed, layer, layer.forward)


def warmup_decay(step: int, n_steps: int, n_warmup: int, schedule: str = "cosine") -> float:
    """The fraction of the full learning rate: a linear warm-up, then a decay to 0, or none.

    Args:
        step: the number of steps taken before.
        schedule: "constant", "linear" or "cosine" (arXiv 1608.03983, equation 5).
    """
    if step < n_warmup:
        return (step + 1) / (n_warmup + 1)
    progress = (step - n_warmup) / max(1, n_steps - n_warmup)
    if schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    return 1 - progress if schedule == "linear" else 1.0
