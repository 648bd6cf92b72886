"""What the optional methods of fine-tuning change: loss, parameter groups, what follows a step."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from tokenizer import Tokenizer
from training import Loss


@dataclass
class Recipe:
    """How a classifier is fine-tuned; each method's `prepare` changes it before training.

    Attributes:
        args: the command line's.
        model: the classifier, with a `llama`.
        label_names: where they are known.
        tokenizer: one that cuts nothing.
        log_probs: of a batch and a callable like the model, log-probabilities
            `(batch, num_labels)` in float32.
        loss: of a batch and the model, a scalar.
        groups: the optimizer's parameter groups, the very dicts that it will use.
        n_steps: of the whole training.
        evaluate: the model's accuracy on dev.
        after_step: called with the model and the number of steps taken.
        finish: called when the best weights of the training are in the model again.
    """

    args: argparse.Namespace
    model: nn.Module
    label_names: list[str] | None
    tokenizer: Tokenizer
    log_probs: Callable[[dict, Callable], torch.Tensor]
    loss: Loss
    groups: list[dict]
    n_steps: int
    evaluate: Callable[[], float]
    after_step: list[Callable[[nn.Module, int], None]] = field(default_factory=list)
    finish: list[Callable[[], None]] = field(default_factory=list)
