"""NumPy's `.npz`: arrays by the names of our tensors, and `model_args` as JSON."""

import json
import zipfile
from pathlib import Path

import numpy as np
import torch

from config import LlamaConfig
from minllama.checkpoints.layout import Checkpoint, build_checkpoint
from minllama.common.errors import InputError


def recognizes(path: str | Path) -> bool:
    """Whether a path is a file of this format."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return "model_args.npy" in archive.namelist()


def load(path: str | Path) -> Checkpoint:
    """Read the config and the tensors.

    Raises:
        InputError: the file is damaged, or not a Llama 2.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = set(arrays.files) - {"model_args"}
            tensors = {name: torch.from_numpy(arrays[name]) for name in names}
            config = LlamaConfig(**json.loads(arrays["model_args"].item()))
    except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not a model in NumPy's format: {error}") from error
    return build_checkpoint(config, tensors, path)
