"""Put a model into the form in which it is trained."""

import os
import shutil

from torch import nn

from llama import Llama
from minllama.common.errors import InputError
from minllama.common.flags import TrainSettings
from minllama.training import distributed
from minllama.training.activation_checkpointing import checkpoint_activations
from utils import autocast_dtype


def prepare_for_training(model: nn.Module, layers: nn.ModuleList, settings: TrainSettings) -> str:
    """Checkpoint activations, compile the layers and shard the model, as the flags say.

    Args:
        layers: the layers of the model's Llama.

    Returns:
        the dtype of autocast. A sharded model computes in its own precision, without autocast.
    """
    dtype = autocast_dtype(settings.dtype, next(model.parameters()).device)
    if settings.activation_checkpointing:
        checkpoint_activations(layers)
    if settings.compile:
        compile_layers(layers)
    if settings.shard and distributed.shard(model, layers, dtype):
        return "float32"
    return dtype


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


def set_dropout(llama: Llama, dropout: float, attention_dropout: float | None) -> None:
    """Set a model's dropout, whatever its checkpoint says."""
    llama.config.dropout = dropout
    llama.config.attention_dropout = dropout if attention_dropout is None else attention_dropout
    for name, module in llama.named_modules():
        if isinstance(module, nn.Dropout):
            is_attention = name.endswith("attn_dropout")
            module.p = llama.config.attention_dropout if is_attention else dropout
