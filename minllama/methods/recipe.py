"""What a method of fine-tuning is, and what it may change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from minllama.common.errors import InputError
from minllama.common.settings import Settings, spelling_of
from minllama.text.batches import Batch, Example
from tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch


class Loss:
    """What fine-tuning goes down: called with a batch and the model, it gives a scalar."""

    def log_probs(self, batch: Batch, model: Callable) -> torch.Tensor:
        """Log-probabilities of the labels, `(batch, num_labels)` in float32.

        Args:
            model: the classifier, or a function that takes what it takes.
        """
        raise NotImplementedError

    def __call__(self, batch: Batch, model: nn.Module) -> torch.Tensor:
        raise NotImplementedError


@dataclass
class Recipe:
    """How a classifier is fine-tuned; each method's `prepare` changes it before training.

    Attributes:
        model: the classifier, with a `llama`.
        label_names: where they are known.
        tokenizer: the model's.
        loss: of a batch and the model.
        groups: the optimizer's parameter groups, the very dicts that it will use.
        batch_size: nominal; the last batch of an epoch may be smaller.
        n_steps: of the whole training.
        evaluate: the model's accuracy on dev.
        after_step: called with the model and the number of steps taken.
        after_epoch: called with the number of the epoch and that of the best one; a text that one
            returns is printed, and ends the training.
        kept: tensors that a method changes as it trains; they belong to the training's state.
        finish: called when the best weights of the training are in the model again.
    """

    model: nn.Module
    label_names: list[str] | None
    tokenizer: Tokenizer
    loss: Loss
    groups: list[dict]
    batch_size: int
    n_steps: int
    evaluate: Callable[[], float]
    after_step: list[Callable[[nn.Module, int], None]] = field(default_factory=list)
    after_epoch: list[Callable[[int, int], str | None]] = field(default_factory=list)
    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    finish: list[Callable[[], None]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Method(Settings):
    """A way to fine-tune: its flags are its fields, and what it does are its methods.

    It is on when one of its flags is set; or, where it has a switch, when that is. A subclass
    overrides what it needs of `choose`, `build`, `rows`, `adapt`, `prepare` and `merge`, which are
    called in this order.

    Attributes:
        tune: the value of `--tune` that turns it on. Only one of these methods can be.
        switch: the one of its flags that turns it on; the others act only with it.
        requires: "label names", or nothing.
        traits: what it makes of the model, for other methods to exclude: "added tensors", "frozen
            weights", "no new head".
        excludes: traits that it does not go with, each with the reason.
        takes_shards: whether each process may hold a part of the model only.
        former_names: parts of the names that its tensors had in older files, and what they are now.
    """

    tune: ClassVar[str | None] = None
    switch: ClassVar[str | None] = None
    requires: ClassVar[frozenset[str]] = frozenset()
    traits: ClassVar[frozenset[str]] = frozenset()
    excludes: ClassVar[dict[str, str]] = {}
    takes_shards: ClassVar[bool] = False
    former_names: ClassVar[dict[str, str]] = {}

    @classmethod
    def needed_for(cls, name: str) -> str | None:
        """What one has to write so that a flag acts: "--tune lora"; None if it acts alone."""
        if cls.tune is not None:
            return f"--tune {cls.tune}"
        return None if cls.switch in (None, name) else f"--{cls.switch}"

    @classmethod
    def is_on(cls, values: dict[str, Any]) -> bool:
        """Whether flags turn it on; one that is absent is at its default."""
        if cls.tune is not None:
            return values.get("tune") == cls.tune
        names = cls.defaults() if cls.switch is None else [cls.switch]
        return any(values.get(name, cls.defaults()[name]) != cls.defaults()[name] for name in names)

    def spelled(self) -> str:
        """How the user has written it, for messages."""
        if self.tune is not None:
            return f"--tune {self.tune}"
        name = self.switch or next(iter(self.changed()))
        return spelling_of(type(self).__dataclass_fields__[name])

    def check(self, others: Sequence[Method]) -> None:
        """See that it goes with the other methods that are on.

        Raises:
            InputError: it does not; the message says why.
        """
        for other in others:
            for trait in sorted(self.excludes.keys() & other.traits):
                raise InputError(
                    f"{self.spelled()}: does not go with {other.spelled()}, {self.excludes[trait]}"
                )

    def choose(self, data: list[Example], num_labels: int, seed: int) -> list[Example]:
        """The examples of train that are trained on."""
        return data

    def build(self, config: Any, tokenizer: Tokenizer) -> nn.Module | None:
        """Another classifier than the one with a new head.

        Args:
            config: what the classifiers of `classifier.py` take, and `label_names`.
        """
        return None

    def rows(
        self, model: nn.Module, tokenizer: Tokenizer, splits: Sequence[list[Example]]
    ) -> list[list[Example]] | None:
        """What the model reads, if it is not the sentences alone, cut to its context."""
        return None

    def adapt(self, model: nn.Module) -> None:
        """Put into the classifier what trains, and freeze what does not."""

    def prepare(self, recipe: Recipe) -> None:
        """Change how it is trained."""

    def merge(self, model: nn.Module) -> None:
        """Make a trained classifier as fast as a plain one, for inference."""
