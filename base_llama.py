"""The base class of Llama: its configuration, its initial weights, and how a part is replaced."""

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from config import LlamaConfig

__all__ = [
    "LlamaConfig",
    "LlamaPreTrainedModel",
    "NoInitialWeights",
    "Wrapper",
    "load_state",
    "named_weights",
    "replace",
    "state_of",
    "trained_state",
]


class LlamaPreTrainedModel(nn.Module):
    """Base class that holds the configuration and draws the initial weights."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config

    def _init_weights(self, module: nn.Module) -> None:
        """Draw a Linear's or Embedding's weight from N(0, 0.02); for `self.apply`."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


class NoInitialWeights(TorchFunctionMode):
    """A context in which the weights of new modules are left as memory happens to be.

    Nothing is drawn. It is for modules whose weights are replaced at once. (The "meta" device does
    the same, but with it PyTorch imports SymPy, which takes a second.)
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"]
        return func(*args, **kwargs)


def replace(module: nn.Module, name: str, new_module: nn.Module) -> None:
    """Put a module in the place of a part of a model. There is no other way to change a model.

    It is in training or evaluation mode as the part was.

    Args:
        name: of the part, with dots where it lies deeper: "layers.0.attention".
    """
    new_module.train(module.get_submodule(name).training)
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, new_module)


class Wrapper(nn.Module):
    """A module that stands in the place of another one and uses it.

    The tensors of what is wrapped keep their names for `named_weights`, so that a checkpoint does
    not depend on what a model was wrapped in.
    """

    def __init__(self, wrapped: nn.Module):
        super().__init__()
        self.wrapped = wrapped


def named_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by the names that they have without wrappers; a shared one comes once."""
    return without_wrappers(dict(module.named_parameters()))


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict by the names that the tensors have without wrappers."""
    return without_wrappers(module.state_dict())


def trained_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """What has to be saved of a model: all of it, or where some is frozen, the trained tensors."""
    parameters = named_weights(module)
    if not all(parameter.requires_grad for parameter in parameters.values()):
        return {name: p.detach() for name, p in parameters.items() if p.requires_grad}
    return state_of(module)


def load_state(module: nn.Module, state: dict[str, torch.Tensor], *, strict: bool = True) -> None:
    """The opposite of `state_of`.

    Args:
        strict: whether all tensors of the module must be there; others than its own never may.

    Raises:
        ValueError: a tensor is missing, or not the module's.
    """
    names = without_wrappers({name: name for name in module.state_dict()})
    if not state.keys() <= names.keys() or (strict and state.keys() != names.keys()):
        raise ValueError(f"not the module's tensors: {sorted(state.keys() ^ names.keys())}")
    module.load_state_dict({names[name]: t for name, t in state.items()}, strict=False)


def without_wrappers(named: dict[str, Any]) -> dict[str, Any]:
    """The same under names without the parts that wrappers put in.

    Raises:
        ValueError: two would get one name, as where a wrapper has a tensor that is called like one
            of what it wraps.
    """
    renamed: dict[str, Any] = {}
    for name, value in named.items():
        short = ".".join(part for part in name.split(".") if part != "wrapped")
        if short in renamed:
            raise ValueError(f"two tensors are called {short} without their wrappers")
        renamed[short] = value
    return renamed
