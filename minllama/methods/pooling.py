"""Pooling: which of a sentence's hidden states the new head sees."""

from dataclasses import dataclass
from typing import ClassVar

from classifier import LlamaEmbeddingClassifier, SentenceClassifier
from minllama.common.settings import flag
from minllama.methods.base import Method


@dataclass(frozen=True, kw_only=True)
class Pooling(Method):
    """The last token's state, or the mean of all (arXiv 1908.10084, section 3)."""

    title = "pooling (arXiv 1908.10084)"
    shardable = True
    excludes: ClassVar = {"no new head": "so no states are pooled"}

    pooling: str | None = flag(
        None,
        "hidden state that the head reads (default: last column, or last token if causal)",
        choices=("last", "mean"),
    )

    def adapt(self, model: SentenceClassifier) -> None:
        assert isinstance(model, LlamaEmbeddingClassifier)  # see `excludes`
        model.pooling = self.pooling
