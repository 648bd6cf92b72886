"""The base class of fine-tuning methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from classifier import SentenceClassifier
from minllama.common.errors import InputError
from minllama.common.settings import Settings, spelling_of
from minllama.text.batches import Batch, Example
from tokenizer import Tokenizer

if TYPE_CHECKING:
    from minllama.methods.train_state import TrainState
else:  # which imports this file
    TrainState = Any


@dataclass(frozen=True, kw_only=True)
class Method(Settings):
    """A way to fine-tune: its fields are flags, and the training loop calls its hooks.

    It is on if its switch is set, or without a switch, if any of its flags is. A subclass overrides
    the hooks that it needs. Before training they are called in the order `build`, `adapt`,
    `choose`, `examples`, `before_training`; then `loss` for every batch, `after_step` after every
    optimizer step, `reason_to_stop` before every epoch; and at the end `after_training` and
    `merge`.

    Attributes:
        tune: the value of `--tune` that turns it on; at most one such method is on.
        switch: the flag that turns it on; its other flags act only with it.
        needs_label_names: whether it reads the names of the labels.
        traits: properties that other methods may exclude: "added tensors", "frozen weights", "no
            new head".
        excludes: traits that it cannot be combined with, each with the reason.
        shardable: whether it works on a sharded model.
    """

    tune: ClassVar[str | None] = None
    switch: ClassVar[str | None] = None
    needs_label_names: ClassVar[bool] = False
    traits: ClassVar[frozenset[str]] = frozenset()
    excludes: ClassVar[dict[str, str]] = {}
    shardable: ClassVar[bool] = False

    @classmethod
    def is_on(cls, values: dict[str, Any]) -> bool:
        """Whether flags turn it on; an absent flag is at its default."""
        if cls.tune is not None:
            return values.get("tune") == cls.tune
        names = cls.defaults() if cls.switch is None else [cls.switch]
        return any(values.get(name, cls.defaults()[name]) != cls.defaults()[name] for name in names)

    @classmethod
    def required_flag(cls, name: str) -> str | None:
        """The flag that one of its flags needs to act, such as "--tune lora"; None if none."""
        if cls.tune is not None:
            return f"--tune {cls.tune}"
        return None if cls.switch in (None, name) else f"--{cls.switch}"

    def spelled(self) -> str:
        """The flag that turned it on, as the user wrote it."""
        if self.tune is not None:
            return f"--tune {self.tune}"
        name = self.switch or next(iter(self.changed()))
        return spelling_of(type(self).__dataclass_fields__[name])

    def check(self, others: Sequence[Method]) -> None:
        """Check that it can be combined with other methods.

        Raises:
            InputError: it cannot; the message says why.
        """
        for other in others:
            for trait in sorted(self.excludes.keys() & other.traits):
                raise InputError(
                    f"{self.spelled()}: cannot be combined with {other.spelled()}, "
                    f"{self.excludes[trait]}"
                )

    def choose(self, sentences: list[Example], num_labels: int, seed: int) -> list[Example]:
        """Select the sentences to train on."""
        return sentences

    def build(self, config: Any, tokenizer: Tokenizer) -> SentenceClassifier | None:
        """Build another classifier than the one with a new head.

        Args:
            config: a `ClassifierConfig`.
        """
        return None

    def adapt(self, model: SentenceClassifier) -> None:
        """Add layers to the classifier, and freeze what is not to train."""

    def examples(
        self, model: SentenceClassifier, tokenizer: Tokenizer, splits: Sequence[list[Example]]
    ) -> list[list[Example]] | None:
        """Make other model inputs of the sentences, truncated to the model's context."""
        return None

    def before_training(self, training: TrainState) -> None:
        """Prepare the model, the parameter groups, and the method's own tensors."""

    def loss(self, training: TrainState, batch: Batch, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss to minimize, given a batch and its loss so far, a scalar."""
        return loss

    def after_step(self, training: TrainState, step: int) -> None:
        """Act after an optimizer step, of which `step` have been taken."""

    def reason_to_stop(self, epoch: int, best_epoch: int) -> str | None:
        """Return a message if training is to stop after this epoch (-1 before the first)."""
        return None

    def after_training(self, training: TrainState) -> bool:
        """Post-process the best epoch's weights; return whether they changed."""
        return False

    def merge(self, model: SentenceClassifier) -> None:
        """Merge added layers into the weights of a trained classifier, for faster inference."""
