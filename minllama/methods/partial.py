"""Training a part of the pretrained weights: only the new head, or the norms' scales."""

from dataclasses import dataclass
from typing import ClassVar

from classifier import SentenceClassifier
from llama import RMSNorm
from minllama.methods.base import Method


@dataclass(frozen=True, kw_only=True)
class HeadOnly(Method):
    """Train the new head, and freeze the rest."""

    title = "--tune head"
    shardable = True
    tune = "head"
    traits = frozenset({"frozen weights"})
    excludes: ClassVar = {"no new head": "so there is nothing to train"}

    def adapt(self, model: SentenceClassifier) -> None:
        model.llama.requires_grad_(False)


@dataclass(frozen=True, kw_only=True)
class NormsOnly(Method):
    """Train the norms' scales, and freeze the rest."""

    title = "--tune norm"
    shardable = True
    tune = "norm"
    traits = frozenset({"frozen weights"})

    def adapt(self, model: SentenceClassifier) -> None:
        model.llama.requires_grad_(False)
        for module in model.llama.modules():
            if isinstance(module, RMSNorm):
                module.requires_grad_()
