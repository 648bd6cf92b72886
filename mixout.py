"""Mixout: dropout toward the pretrained weights."""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

from linear import Linear, product
from llama import Llama
from recipe import Recipe
from utils import InputError, adder, number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = adder(parser.add_argument_group("Mixout"))
    help = "probability with which a weight is the pretrained one in a training step"
    add("--mixout", type=number(float, 0, 0.99), default=0.0, metavar="P", help=help)


def prepare(recipe: Recipe) -> None:
    """Mix the linear layers of all layers, as the authors' code does; norms and embedding are not.

    Raises:
        InputError: these layers do not train.
    """
    if recipe.args.mixout == 0:
        return
    if recipe.args.tune != "full":
        raise InputError(f"--mixout mixes weights that --tune {recipe.args.tune} does not train")
    add_mixout(recipe.model.llama, recipe.args.mixout)


class MixoutLinear(Linear):
    """In training, x times a random mixture of the weights W and the pretrained U.

    Every element is taken from U with probability p, and corrected so that the expectation is W:
    (M∘U + (1 - M)∘W - p·U) / (1 - p) (arXiv 1909.11299, section 4).

    Attributes:
        weight: W `(out_features, in_features)`, the same parameter as that of `linear`.
        pretrained: U, a copy of W as it is now.
    """

    def __init__(self, linear: Linear, p: float):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias, self.p = linear.weight, None, p
        self.register_buffer("pretrained", linear.weight.detach().clone(), persistent=False)

    def mixed(self) -> torch.Tensor:
        """One random mixture: U + (1 - M)∘(W - U) / (1 - p)."""
        return self.pretrained + F.dropout(self.weight - self.pretrained, self.p)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(…, in_features)` to `(…, out_features)`."""
        return product(x, self.mixed() if self.training else self.weight)


def add_mixout(llama: Llama, p: float) -> None:
    for module in list(llama.layers.modules()):
        for name, child in list(module.named_children()):
            if type(child) is Linear:
                setattr(module, name, MixoutLinear(child, p))
