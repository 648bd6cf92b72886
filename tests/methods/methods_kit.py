"""What the tests of several methods share: a batch, and training in a few lines."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from minllama import methods
from minllama.methods.base import Method
from minllama.methods.classify import Classifier
from minllama.methods.settings import FinetuneSettings
from minllama.methods.train_state import TrainState
from minllama.tasks.finetune import train_epochs
from minllama.text.batches import Batch, Example

NAMES = ["bad", "fair enough", "good"]
TOKENS = torch.randint(3, 320, (6, 11), generator=torch.Generator().manual_seed(1))
BATCH = Batch(
    token_ids=TOKENS,
    labels=torch.tensor([0, 1, 2, 0, 1, 2]),
    sents=["a sentence"] * 6,
    lengths=torch.tensor([11, 10, 7, 11, 5, 8]),
)
EXAMPLES = [
    Example("a sentence", label, row[:length])
    for row, label, length in zip(
        TOKENS.tolist(), BATCH.labels.tolist(), BATCH.lengths.tolist(), strict=True
    )
]


def methods_of(flags: dict) -> tuple[Method, ...]:
    """The methods that flags turn on; a flag that no method has is a mistake in the test."""
    assert flags.keys() <= methods.flag_values(()).keys(), flags
    return methods.active_methods(flags)


def settings_of(classifier: Classifier, lr: float = 1e-2, **more) -> FinetuneSettings:
    """Settings that train a classifier on batches of `EXAMPLES`."""
    path = Path(classifier.config.pretrained_model_path)
    return FinetuneSettings(
        option="finetune",
        methods=classifier.config.methods,
        filepath=str(path.with_name("trained.pt")),
        **{"epochs": 1, "batch_size": 6, "lr": lr, "skip_train_eval": True} | more,
    )


def make_training(classifier: Classifier, n_steps: int = 3, lr: float = 1e-2) -> TrainState:
    """A training of so many steps, before its first."""
    return TrainState(settings_of(classifier, lr), classifier, EXAMPLES * n_steps, EXAMPLES)


def loss_of(training: TrainState, batch: Batch = BATCH) -> torch.Tensor:
    """The loss of a batch with what the methods add to it."""
    log_probs = training.log_probs(batch)
    loss = F.nll_loss(log_probs, batch.labels, reduction="sum") / 6
    for method in training.settings.methods:
        loss = method.loss(training, batch, loss)
    return loss


def train(classifier: Classifier, n_steps: int = 3) -> None:
    """Train for an epoch of so many steps, each on six examples."""
    train_epochs(settings_of(classifier), classifier, EXAMPLES * n_steps, EXAMPLES)


@torch.no_grad()
def predictions(model: nn.Module) -> torch.Tensor:
    return model.eval()(BATCH.token_ids, BATCH.lengths)


def dev_loss(model: nn.Module) -> float:
    """The mean loss of a model without what methods add to it."""
    return F.nll_loss(predictions(model), BATCH.labels).item()


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}
