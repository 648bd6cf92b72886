"""Prompt-based and few-shot fine-tuning: the prompt and the label words instead of a new head."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from classifier import LlamaZeroShotClassifier, SentenceClassifier
from minllama.common.settings import flag
from minllama.methods.base import Method
from minllama.text.batches import Example
from minllama.text.labelled import few_shot, fit_context
from minllama.text.prompts import TEMPLATE, make_prompts
from tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class PromptBased(Method):
    """Train the model to continue the prompt with the label's name."""

    title = "prompt-based fine-tuning (arXiv 2109.01247)"
    switch = "prompt_based"
    needs_label_names = True
    traits = frozenset({"no new head"})

    prompt_template: str = flag(
        TEMPLATE,
        "prompt with {sentence}, and optionally {labels} for their names",
        metavar="TEXT",
    )
    prompt_based: bool = flag(False, "train the model to continue a prompt with the label's name")

    def build(self, config: Any, tokenizer: Tokenizer) -> SentenceClassifier:
        """Build the zero-shot classifier, to be trained."""
        return PromptClassifier(config, tokenizer, config.label_names)

    def examples(
        self, model: SentenceClassifier, tokenizer: Tokenizer, splits: Sequence[list[Example]]
    ) -> list[list[Example]]:
        """Make prompts; long ones lose their beginning."""
        assert isinstance(model, LlamaZeroShotClassifier)
        causal = model.llama.config.causal
        prompts = (
            make_prompts(data, self.prompt_template, model.label_names, tokenizer, causal=causal)
            for data in splits
        )
        return fit_context(*prompts, max_len=model.max_prompt_len, keep="last")


class PromptClassifier(LlamaZeroShotClassifier):
    """The zero-shot classifier, trained (arXiv 2109.01247; LM-BFF, arXiv 2012.15723, equation 1).

    p(label | prompt) is the probability that the label's name continues the prompt, divided by the
    sum of those of all labels.
    """

    def __init__(self, config: Any, tokenizer: Tokenizer, label_names: Sequence[str]):
        super().__init__(config, tokenizer, label_names)
        self.llama.requires_grad_()

    def forward(self, input_ids: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Log-probabilities of the labels, `(batch, num_labels)`, from prompts as its base does."""
        return F.log_softmax(super().forward(input_ids, lengths), dim=-1)


@dataclass(frozen=True, kw_only=True)
class FewShot(Method):
    """Train on a few sentences of each label."""

    title = "few-shot fine-tuning"
    shardable = True

    shots: int | None = flag(None, "train on K random sentences per label", low=1, metavar="K")

    def choose(self, sentences: list[Example], num_labels: int, seed: int) -> list[Example]:
        """Draw `shots` sentences of each label."""
        assert self.shots is not None  # else the method is off
        return few_shot(sentences, self.shots, num_labels, seed)
