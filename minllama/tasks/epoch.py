"""One epoch of fine-tuning: the loss of a batch, and steps over all batches."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from minllama.common.progress import Bar, Pace
from minllama.evaluation.classification import inputs_of
from minllama.methods.recipe import Loss
from minllama.tasks.resuming import Progress, generator_states, restore_generators
from minllama.text.batches import Batch
from minllama.training import distributed
from minllama.training.step import check_finite, mixed_precision, update
from utils import to_device


@dataclass(frozen=True)
class ClassificationLoss(Loss):
    """Negative log-likelihood of the labels, summed and divided by the nominal batch size."""

    batch_size: int
    device: torch.device
    dtype: str

    def log_probs(self, batch: Batch, model: Callable) -> torch.Tensor:
        with mixed_precision(self.device, self.dtype):
            return model(*inputs_of(batch, self.device))

    def __call__(self, batch: Batch, model: nn.Module) -> torch.Tensor:
        log_probs = self.log_probs(batch, model)
        labels = to_device(batch.labels, self.device)
        return F.nll_loss(log_probs, labels, reduction="sum") / self.batch_size


class LossOfModel(nn.Module):
    """The loss of a batch, with the model inside, as those want it who add up gradients.

    Args:
        loss: of a batch and a model.
    """

    def __init__(self, loss: Callable[[Batch, nn.Module], torch.Tensor], model: nn.Module):
        super().__init__()
        self.loss, self.model = loss, model

    def forward(self, batch: Batch) -> torch.Tensor:
        """The loss of this process's share of a batch, a scalar."""
        lengths = [] if batch.lengths is None else [batch.lengths]
        rows, counts = distributed.share(batch.token_ids, batch.labels, *lengths)
        token_ids, labels, *lengths = rows
        loss = self.loss(Batch(token_ids, labels, [], *lengths), self.model)
        return loss if counts else 0 * loss


def train_epoch(
    model: nn.Module,
    loader: DataLoader,
    optimizer: Optimizer,
    loss: Callable[[Batch, nn.Module], torch.Tensor],
    epoch: int,
    grad_accum: int = 1,
    after_step: Sequence[Callable[[nn.Module, int], None]] = (),
    *,
    spread: nn.Module | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    keep: Callable[[], None] | None = None,
    pace: Pace | None = None,
) -> float:
    """One pass over the loader; returns the mean loss of its batches.

    Args:
        grad_accum: batches per step of the optimizer. The last step of an epoch may have fewer; its
            gradient is then smaller in proportion.
        after_step: called with the model and the number of steps taken in all epochs.
        spread: the `LossOfModel` of loss and model in several processes.
        seed: of what these draw apart.
        progress: of the training; the pass goes on behind the steps that it has losses of.
        keep: called after each step, when its loss is there.
        pace: of the whole training, for the time left.

    Raises:
        InputError: the loss is not finite; on a CPU the weights are left as they were before that
            step.
    """
    spread = LossOfModel(loss, model) if spread is None else spread
    device = next(model.parameters()).device
    progress = Progress() if progress is None else progress
    model.train()
    n_steps, n_taken = math.ceil(len(loader) / grad_accum), len(progress.losses)
    if n_taken == 0:
        progress.at_start = generator_states(device)
    else:
        restore_generators(progress.at_start, device)
    bar = Bar(loader, desc=f"train-{epoch}")
    batches = iter(bar)
    for _ in itertools.islice(batches, n_taken * grad_accum):  # their order is drawn again
        pass
    if n_taken > 0:
        restore_generators(progress.now, device)
    for step in range(n_taken, n_steps):
        group = list(itertools.islice(batches, grad_accum))
        with distributed.own_draws(seed, epoch * n_steps + step, device):
            losses = losses_of(group, spread, grad_accum)
            loss = update(model, losses, optimizer, f"epoch {epoch}, step {step}")
        progress.losses.append(loss)
        if pace is not None:
            pace.record("step")
            bar.report(loss.item() if device.type == "cpu" else None, pace.seconds_left)
        for call in after_step:
            call(model, epoch * n_steps + step + 1)
        if keep is not None:
            keep()
    losses = torch.stack(progress.losses)
    check_finite(losses, f"epoch {epoch}")
    return sum(grad_accum * loss for loss in losses.tolist()) / len(loader)


def losses_of(batches: list[Batch], spread: nn.Module, grad_accum: int) -> Iterator[torch.Tensor]:
    """The loss of each batch, as a share of their mean."""
    for i, batch in enumerate(batches, start=1):
        distributed.add_up_now(spread, i == len(batches))
        yield spread(batch) / grad_accum
