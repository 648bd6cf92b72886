"""Learning rates that differ by step and by layer, and when to stop early."""

from dataclasses import dataclass

from torch import nn

from minllama.common.errors import InputError
from minllama.common.settings import flag
from minllama.methods.recipe import Method, Recipe
from minllama.training.step import learning_rate


@dataclass(frozen=True, kw_only=True)
class LearningRates(Method):
    """Group the parameters by depth, and set the rates before every step."""

    title = "learning rates (arXiv 1801.06146)"
    takes_shards = True

    lr_schedule: str = flag(
        "constant",
        "whether and how --lr goes down to 0 over the training",
        choices=("constant", "linear", "cosine"),
    )
    warmup: float = flag(
        0.0, "share of the steps in which --lr is reached", high=1, metavar="SHARE"
    )
    layer_decay: float = flag(
        1.0,
        "each layer's learning rate as a fraction of that of the layer above it",
        high=1,
        metavar="FRACTION",
    )

    def prepare(self, recipe: Recipe) -> None:
        """
        Raises:
            InputError: all that trains is at one depth.
        """
        if self.layer_decay != 1:
            (group,) = recipe.groups
            recipe.groups = groups_by_depth(recipe.model, group["lr"], self.layer_decay)
            if len(recipe.groups) == 1:
                raise InputError("--layer_decay: all that trains is in one layer; leave it out")
        if self.lr_schedule == "constant" and self.warmup == 0:
            return
        highest = [group["lr"] for group in recipe.groups]
        n_warmup = round(self.warmup * recipe.n_steps)

        def set_rates(step: int) -> None:
            for group, rate in zip(recipe.groups, highest, strict=True):
                group["lr"] = learning_rate(
                    step, recipe.n_steps, n_warmup, rate, schedule=self.lr_schedule
                )

        set_rates(0)
        recipe.after_step.append(lambda _model, step: set_rates(step))


def groups_by_depth(model: nn.Module, lr: float, decay: float) -> list[dict]:
    """Parameters with rates lr · decay^(distance from the top) (arXiv 1801.06146, section 3.2).

    At the top are the new head and the last norm, below them the layers, then the embeddings.
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
    """0 for the embeddings, 1 for the first layer, `n_layers` + 1 for what comes after the last."""
    if name.startswith("llama.tok_embeddings."):
        return 0
    if name.startswith("llama.layers."):
        return 1 + int(name.split(".")[2])
    return n_layers + 1


@dataclass(frozen=True, kw_only=True)
class EarlyStopping(Method):
    """Stop when dev has not become better for some epochs."""

    title = "early stopping"
    takes_shards = True

    patience: int | None = flag(
        None, "stop when dev has not become better for so many epochs", low=1, metavar="EPOCHS"
    )

    def prepare(self, recipe: Recipe) -> None:
        recipe.after_epoch.append(self.reason_to_stop)

    def reason_to_stop(self, epoch: int, best_epoch: int) -> str | None:
        if epoch - best_epoch < self.patience:
            return None
        return f"stop: dev has not become better for {self.patience} epochs"
