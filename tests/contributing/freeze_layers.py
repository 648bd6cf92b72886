"""Freezing the lowest layers in fine-tuning."""

from dataclasses import dataclass

from classifier import SentenceClassifier
from minllama.common.errors import InputError
from minllama.common.settings import flag
from minllama.methods.base import Method


@dataclass(frozen=True, kw_only=True)
class FreezeLayers(Method):
    """Freeze the lowest layers (arXiv 1911.03090)."""

    title = "frozen layers (arXiv 1911.03090)"
    traits = frozenset({"frozen weights"})

    freeze_layers: int = flag(0, "number of lowest layers that do not train")

    def adapt(self, model: SentenceClassifier) -> None:
        """Freeze the layers.

        Raises:
            InputError: the model has fewer layers.
        """
        layers = model.llama.layers
        if self.freeze_layers > len(layers):
            raise InputError(f"--freeze_layers {self.freeze_layers}: the model has {len(layers)}")
        layers[: self.freeze_layers].requires_grad_(False)
