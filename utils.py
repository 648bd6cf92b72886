"""Seeds, devices and memory.

Nothing here needs PyTorch before a function does, so that `--help` is quick.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from minllama.common.errors import InputError

if TYPE_CHECKING:
    import torch


def seed_everything(seed: int = 11711) -> None:
    """Seed the generators of `random`, numpy and PyTorch, on every device."""
    import random

    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def pick_device(use_gpu: bool) -> torch.device:
    """CUDA or else MPS where a GPU is asked for, otherwise the CPU.

    Raises:
        InputError: there is neither.
    """
    import torch

    if not use_gpu:
        return torch.device("cpu")
    device = best_device()
    if device.type == "cpu":
        raise InputError("--use_gpu: PyTorch finds neither a CUDA nor an MPS device; leave it out")
    return device


def best_device() -> torch.device:
    """CUDA, or else MPS (which several processes cannot share), or else the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    is_alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    return torch.device("mps" if torch.backends.mps.is_available() and is_alone else "cpu")


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on another device. Nothing waits for its way from here to a GPU of CUDA."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def peak_memory(device: torch.device) -> int | None:
    """The most bytes that were in use so far: of the GPU's memory, or by this process.

    Returns:
        None where the system does not tell (Windows).
    """
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
