"""Checkpointed activations: less memory for one more forward pass."""

from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from base_llama import Wrapper, replace


class CheckpointedLayer(Wrapper):
    """A layer that keeps only its input for the backward pass, and computes the rest again in it.

    arXiv 1604.06174; the results are the same.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Arguments and result are those of the layer."""
        return checkpoint(self._run, self.wrapped.training, *args, use_reentrant=False, **kwargs)

    def _run(self, training: bool, *args: Any, **kwargs: Any) -> Any:
        """Run the layer in the mode it was first run in, whatever mode it is in by now."""
        before = self.wrapped.training
        self.wrapped.train(training)
        try:
            return self.wrapped(*args, **kwargs)
        finally:
            self.wrapped.train(before)


def checkpoint_activations(layers: nn.ModuleList) -> None:
    """Let each layer be a `CheckpointedLayer`."""
    for i, layer in enumerate(layers):
        replace(layers, str(i), CheckpointedLayer(layer))
