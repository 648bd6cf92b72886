"""Seeds, devices and memory."""

import functools
import os
import random
import sys
import warnings

import numpy as np
import torch

from minllama.common.errors import InputError


def seed_everything(seed: int = 11711) -> None:
    """Seed the generators of `random`, NumPy and PyTorch, on every device."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def pick_device(use_gpu: bool) -> torch.device:
    """CUDA, or else MPS, if a GPU is wanted; otherwise the CPU.

    Raises:
        InputError: a GPU is wanted and there is none.
    """
    if not use_gpu:
        return torch.device("cpu")
    device = best_device()
    if device.type == "cpu":
        raise InputError("--use_gpu: PyTorch finds neither a CUDA nor an MPS device; leave it out")
    return device


def best_device() -> torch.device:
    """CUDA, or else MPS (which several processes cannot share), or else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    is_alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    return torch.device("mps" if torch.backends.mps.is_available() and is_alone else "cpu")


@functools.cache
def has_fast_bfloat16(device: str) -> bool:
    """Whether bfloat16 products are faster than float32's on a type of device, such as "cpu".

    PyTorch has fast ones for CPUs with AVX-512 or AMX.
    """
    if device != "cpu":
        return True
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def autocast_dtype(dtype: str, device: torch.device) -> str:
    """The dtype of autocast for `--dtype`: float32, with a warning, where bfloat16 is slower."""
    if dtype != "bfloat16" or has_fast_bfloat16(device.type):
        return dtype
    warnings.warn(
        "--dtype bfloat16: this CPU has no fast bfloat16 products (AVX-512 or AMX), so products "
        "are computed in float32",
        stacklevel=2,
    )
    return "float32"


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Move a tensor to a device; the CPU does not wait for a copy to CUDA."""
    device = torch.device(device)
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def peak_memory(device: torch.device) -> int | None:
    """The largest number of bytes in use so far, on the GPU or by this process.

    Returns:
        None on Windows, which does not report it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
