"""Mixout: dropout toward the pretrained weights."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from base_llama import replace
from minllama.common.settings import flag
from minllama.kernels.cpu import FastLinear, product
from minllama.methods.base import Method, TrainState


@dataclass(frozen=True, kw_only=True)
class Mixout(Method):
    """Mix the linear layers of all layers; norms and embedding are not, as in the authors' code."""

    title = "Mixout (arXiv 1909.11299)"
    excludes: ClassVar = {"frozen weights": "whose frozen weights would be mixed with themselves"}

    mixout: float = flag(
        0.0,
        "probability of replacing a weight by its pretrained value",
        high=0.99,
        metavar="P",
    )

    def before_training(self, training: TrainState) -> None:
        """Replace every linear layer of attention and feed-forward by a `MixoutLinear`."""
        layers = training.model.llama.layers
        for name, module in list(layers.named_modules()):
            if isinstance(module, nn.Linear):
                replace(layers, name, MixoutLinear(module, self.mixout))


class MixoutLinear(FastLinear):
    """A linear layer that trains with a random mixture of its weights W and the pretrained U.

    Every element is taken from U with probability p, and corrected so that the expectation is W:
    (M∘U + (1 - M)∘W - p·U) / (1 - p) (arXiv 1909.11299, section 4).

    Args:
        linear: the layer whose W this one shares.
        p: probability that an element is taken from U.

    Attributes:
        weight: W `(out_features, in_features)`.
        pretrained: U, a copy of W as it is now.
    """

    def __init__(self, linear: nn.Linear, p: float):
        super().__init__(linear)
        self.p = p
        self.pretrained: torch.Tensor
        self.register_buffer("pretrained", linear.weight.detach().clone(), persistent=False)

    def mixed(self) -> torch.Tensor:
        """Draw a mixture, U + (1 - M)∘(W - U) / (1 - p)."""
        return self.pretrained + F.dropout(self.weight - self.pretrained, self.p)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(…, in_features)` to `(…, out_features)`."""
        return product(x, self.mixed()) if self.training else super().forward(x)
