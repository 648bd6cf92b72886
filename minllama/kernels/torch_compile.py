"""Layers compiled by torch.compile, for training."""

import os
import shutil

from torch import nn

from minllama.common.errors import InputError


def compile_layers(layers: nn.ModuleList) -> None:
    """Let torch.compile fuse the operations between the matrix products of every layer.

    Raises:
        InputError: no C++ compiler is installed, which a CPU needs.
    """
    on_cpu = next(layers.parameters()).device.type == "cpu"
    if on_cpu and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise InputError("--compile: there is no C++ compiler here; install g++, or leave it out")
    for layer in layers:
        layer.compile()
