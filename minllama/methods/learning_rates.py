"""Learning rates that differ by step and by layer, and early stopping."""

from dataclasses import dataclass

from torch import nn

from classifier import SentenceClassifier
from minllama.common.errors import InputError
from minllama.common.settings import flag
from minllama.methods.base import Method, TrainState
from minllama.training.schedule import learning_rate


@dataclass(frozen=True, kw_only=True)
class LearningRates(Method):
    """Group the parameters by depth, and set the rates before every step."""

    title = "learning rates (arXiv 1801.06146)"
    shardable = True

    lr_schedule: str = flag(
        "constant",
        "learning-rate schedule after the warm-up",
        choices=("constant", "linear", "cosine"),
    )
    warmup: float = flag(
        0.0, "fraction of the optimizer steps for linear warm-up", high=1, metavar="FRACTION"
    )
    layer_decay: float = flag(
        1.0,
        "factor on the learning rate per layer below the top",
        high=1,
        metavar="FACTOR",
    )

    def before_training(self, training: TrainState) -> None:
        """Split the parameter group by depth, and set the rates of the first step.

        Raises:
            InputError: all that trains is at one depth.
        """
        if self.layer_decay != 1:
            (group,) = training.groups
            groups = groups_by_depth(training.model, group["lr"], self.layer_decay)
            if len(groups) == 1:
                raise InputError("--layer_decay: all that trains is in one layer; leave it out")
            training.groups[:] = groups
        if self.lr_schedule != "constant" or self.warmup > 0:
            for group in training.groups:
                group["initial_lr"] = group["lr"]
            self.after_step(training, 0)

    def after_step(self, training: TrainState, step: int) -> None:
        """Set the rates of the next step."""
        n_warmup = round(self.warmup * training.n_steps)
        for group in training.groups:
            if "initial_lr" in group:
                group["lr"] = learning_rate(
                    step, training.n_steps, n_warmup, group["initial_lr"], schedule=self.lr_schedule
                )


def groups_by_depth(model: SentenceClassifier, lr: float, decay: float) -> list[dict]:
    """Parameters with rates lr · decay^(distance from the top) (arXiv 1801.06146, section 3.2).

    The top has the head and the last norm, below it are the layers, then the embeddings.
    """
    n_layers = len(model.llama.layers)
    groups: dict[int, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(depth(name, n_layers), []).append(parameter)
    return [
        {"params": parameters, "lr": lr * decay ** (n_layers + 1 - at)}
        for at, parameters in sorted(groups.items())
    ]


def depth(name: str, n_layers: int) -> int:
    """0 for the embeddings, 1 for the first layer, `n_layers` + 1 after the last."""
    if name.startswith("llama.tok_embeddings."):
        return 0
    if name.startswith("llama.layers."):
        return 1 + int(name.split(".")[2])
    return n_layers + 1


@dataclass(frozen=True, kw_only=True)
class EarlyStopping(Method):
    """Stop when the accuracy on dev has not improved for some epochs."""

    title = "early stopping"
    shardable = True

    patience: int | None = flag(
        None, "stop after this many epochs without improvement on dev", low=1, metavar="EPOCHS"
    )

    def reason_to_stop(self, epoch: int, best_epoch: int) -> str | None:
        if self.patience is None or epoch - best_epoch < self.patience:
            return None
        return f"stop: dev has not become better for {self.patience} epochs"
