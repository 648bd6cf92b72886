"""The base class of Llama: its configuration, its initial weights, and replacing its parts."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from config import LlamaConfig

__all__ = ["LlamaConfig", "LlamaPreTrainedModel", "NoInitialWeights", "replace"]


class LlamaPreTrainedModel(nn.Module):
    """Base class that holds the configuration and draws the initial weights."""

    config_class = LlamaConfig
    base_model_prefix = "llama"

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.n_layers = config.n_layers

    @property
    def dtype(self) -> torch.dtype:
        """The type of the first parameter."""
        return next(self.parameters()).dtype

    def init_weights(self) -> None:
        """Re-initialize all weights."""
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        """Draw the weight of a Linear or Embedding from N(0, 0.02); for `self.apply`."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


class NoInitialWeights(TorchFunctionMode):
    """A context in which new modules draw no random numbers; their weights are uninitialized.

    It is for modules whose weights are replaced at once. (The "meta" device does the same, but
    PyTorch imports SymPy for it, which takes a second.)
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"]
        return func(*args, **kwargs)


def replace(module: nn.Module, name: str, new_module: nn.Module) -> None:
    """Put a new module in the place of a part of a model, in the same mode (training or not).

    Args:
        module: the model.
        name: the name of the part, with dots where it lies deeper: "layers.0.attention".
        new_module: usually a subclass of the part's class that shares its parameters.
    """
    new_module.train(module.get_submodule(name).training)
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, new_module)
