"""Prompt-based fine-tuning: the prompt and the label words instead of a new head."""

import argparse
import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from classifier import LlamaZeroShotClassifier
from dataset import Example
from utils import InputError, adder, number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = adder(parser.add_argument_group("prompt-based and few-shot fine-tuning"))
    help = "train the model to continue the prompt with the label's name; there is no new head"
    add("--prompt_based", action="store_true", help=help)
    help = "train on so many sentences of each label, drawn with --seed"
    add("--shots", type=number(int, 1), metavar="K", help=help)


class PromptClassifier(LlamaZeroShotClassifier):
    """The zero-shot classifier, trained (arXiv 2109.01247; LM-BFF, arXiv 2012.15723, equation 1).

    p(label | prompt) is the probability of the label's name behind the prompt, over the sum of
    those of all labels.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.llama.requires_grad_()

    def forward(self, input_ids: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Log-probabilities of the labels, `(batch, num_labels)`, from prompts as its base does."""
        return F.log_softmax(super().forward(input_ids, lengths), dim=-1)


def few_shot(data: Sequence[Example], shots: int, num_labels: int, seed: int) -> list[Example]:
    """Some sentences of each label, in the data's order.

    Raises:
        InputError: a label does not have so many.
    """
    chosen: list[int] = []
    generator = random.Random(seed)
    for label in range(num_labels):
        rows = [i for i, example in enumerate(data) if example[1] == label]
        if len(rows) < shots:
            raise InputError(f"--shots {shots}: label {label} has {len(rows)} sentences")
        chosen += generator.sample(rows, shots)
    return [data[i] for i in sorted(chosen)]
