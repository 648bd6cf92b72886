"""Activation checkpointing: less memory for one more forward pass (arXiv 1604.06174)."""

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from base_llama import NoInitialWeights, replace
from llama import LlamaLayer


class CheckpointedLayer(LlamaLayer):
    """A layer that saves only its input for the backward pass, which computes the rest again.

    Args:
        layer: the plain layer, whose parts become this one's.
    """

    def __init__(self, layer: LlamaLayer):
        with NoInitialWeights():
            super().__init__(layer.layer_id, layer.attention.config)
        for name, part in layer.named_children():
            setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Arguments and result are those of `LlamaLayer`."""
        return checkpoint(self._run, self.training, *args, use_reentrant=False, **kwargs)

    def _run(self, training: bool, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the layer in a given mode; its own may have changed before the second run."""
        mode_now = self.training
        self.train(training)
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.train(mode_now)


def checkpoint_activations(layers: nn.ModuleList) -> None:
    """Replace each layer by a `CheckpointedLayer`."""
    for i, layer in enumerate(layers):
        assert isinstance(layer, LlamaLayer)
        replace(layers, str(i), CheckpointedLayer(layer))
