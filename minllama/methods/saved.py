"""What fine-tuning saves, and taking it up again."""

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from minllama.checkpoints.layout import is_dense, is_finite
from minllama.checkpoints.pt import read_checkpoint, write_checkpoint
from minllama.common.errors import InputError
from minllama.common.flags import TaskSettings, dataset_of
from minllama.common.settings import Settings, to_plain
from minllama.methods import build_classifier, former_names, switched_on
from minllama.methods.recipe import Method
from minllama.text.labelled import MAX_LABELS, load_label_names
from minllama.training import distributed
from minllama.training.state import trained_state
from tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(Settings):
    """What the classifiers take, as it is saved.

    Attributes:
        option: "finetune", or "pretrain" where Llama is frozen.
        causal: as the model is.
        label_names: where they are known.
        init_weights: whether to draw the initial weights, for what is drawn after them.
    """

    pretrained_model_path: str
    num_labels: int
    option: str
    hidden_dropout_prob: float
    causal: bool | None = None
    label_names: list[str] | None = None
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        names = self.label_names
        if not 1 <= self.num_labels <= MAX_LABELS:
            raise InputError(f"{self.num_labels} labels, expected 1 to {MAX_LABELS}")
        if names is not None and len(names) != self.num_labels:
            raise InputError(f"{len(names)} names for {self.num_labels} labels")
        if self.option not in ("finetune", "pretrain"):
            raise InputError(f"option {self.option}, expected finetune or pretrain")
        if not 0 <= self.hidden_dropout_prob <= 1:
            raise InputError(f"hidden_dropout_prob {self.hidden_dropout_prob}, expected 0 to 1")


REQUIRED = ("pretrained_model_path", "num_labels", "option", "hidden_dropout_prob")


@dataclass(frozen=True)
class SavedRun:
    """What a file that fine-tuning saved tells.

    Attributes:
        weights: the trained tensors; all of them where the model was trained whole.
        frozen: what `frozen_digest` gave of the others; None in old files.
        args: the run's flags.
    """

    path: str
    weights: dict[str, torch.Tensor]
    frozen: str | None
    args: dict[str, Any]
    config: ClassifierConfig
    methods: tuple[Method, ...]


def save_model(
    model: nn.Module, optimizer: Optimizer, args: Any, config: Any, filepath: str | Path
) -> None:
    """Save weights, optimizer, settings and generator states, as tensors and plain values."""
    write_saved(saved_model(model, optimizer, args, config), filepath)


def write_saved(saved: dict[str, Any], filepath: str | Path) -> None:
    """Write what `saved_model` gave, and tell so."""
    distributed.on_first(lambda: write_checkpoint(saved, filepath))
    print(f"save the model to {filepath}")


def saved_model(model: nn.Module, optimizer: Optimizer, args: Any, config: Any) -> dict[str, Any]:
    """What `save_model` saves."""
    distributed.keep_parts(model)
    kind, keys, *rest = np.random.get_state()
    return {
        "model": distributed.whole(trained_state(model)),
        "frozen": frozen_digest(model),
        "optim": distributed.whole(optimizer.state_dict()),
        "args": plain_values(args),
        "model_config": plain_values(config),
        "system_rng": random.getstate(),
        "numpy_rng": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch_rng": torch.random.get_rng_state(),
    }


def plain_values(settings: Any) -> dict[str, Any]:
    """Settings, or the attributes of any object, as a checkpoint can hold them."""
    if isinstance(settings, Settings):
        return settings.to_dict()
    return {name: to_plain(value) for name, value in vars(settings).items()}


def read_saved(path: str | Path, settings_class: type[Settings]) -> SavedRun:
    """What `save_model` saved, checked.

    Args:
        settings_class: what the flags are checked against; others that are there are left alone.

    Raises:
        InputError: it is something else.
    """
    saved = read_checkpoint(path)
    if not all(isinstance(saved.get(part), dict) for part in ("model", "args", "model_config")):
        raise InputError(f"{path}: not what --option finetune saves")
    values = saved["model_config"]
    try:
        methods = switched_on(values)
        missing = [name for name in REQUIRED if name not in values]
        if missing:
            raise InputError(f"{', '.join(missing)} is missing")
        config = ClassifierConfig(**ClassifierConfig.known(values))
        settings_class(**settings_class.known(saved["args"]))
        if not isinstance(saved.get("frozen"), str | None):
            raise InputError("the digest of the frozen weights is no text")
        if values.get("keep_bfloat16"):  # of an older version, which had them in bfloat16
            saved["frozen"] = None
    except InputError as error:
        raise InputError(f"{path}: {error}: not what --option finetune saves") from error
    weights = {}
    for name, tensor in saved["model"].items():
        if not is_dense(tensor):
            raise InputError(f"{path}: {name} is no tensor of floating-point numbers")
        for old, new in former_names(methods).items():
            name = str(name).replace(old, new)
        weights[name] = tensor
    return SavedRun(str(path), weights, saved.get("frozen"), saved["args"], config, methods)


def load_trained(model: nn.Module, saved: dict[str, torch.Tensor], path: str | Path) -> None:
    """Load what `trained_state` gave into a model that was built and adapted alike.

    Raises:
        InputError: these are not its trained tensors.
    """
    expected = trained_state(model)
    if saved.keys() != expected.keys() or not all(
        isinstance(saved[name], torch.Tensor) and saved[name].shape == tensor.shape
        for name, tensor in expected.items()
    ):
        raise InputError(f"{path}: its tensors are not those that its settings describe")
    for name, tensor in saved.items():
        if not is_dense(tensor):
            raise InputError(f"{path}: {name} is no tensor of floating-point numbers")
        if not is_finite(tensor):
            raise InputError(f"{path}: {name} has values that are not finite in float32")
    model.load_state_dict(saved, strict=False)


def frozen_digest(model: nn.Module) -> str:
    """SHA-256 of the tensors that do not train, to know their base again by."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            tensor = parameter.detach()
            tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """How many numbers train, and how many there are."""
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return trained, sum(p.numel() for p in parameters)


def load_classifier(saved: SavedRun, config: ClassifierConfig, tokenizer: Tokenizer) -> nn.Module:
    """The classifier that a run saved.

    Args:
        config: the run's, with the checkpoint that it began with.

    Raises:
        InputError: it began with other weights.
    """
    model = build_classifier(config, saved.methods, tokenizer)
    load_trained(model, saved.weights, saved.path)
    if saved.frozen not in (None, frozen_digest(model)):
        raise InputError(
            f"{saved.path}: trained on other weights than {config.pretrained_model_path}; "
            "name them with --pretrained-model-path"
        )
    for method in saved.methods:
        method.merge(model)
    return model


def same_label_names(settings: TaskSettings, config: ClassifierConfig) -> list[str]:
    """The names in `settings.label_names`.

    Raises:
        InputError: there are more or fewer than labels, or the model was trained with others.
    """
    names = load_label_names(settings.label_names)
    if len(names) != config.num_labels or config.label_names not in (None, names):
        known = config.label_names or f"{config.num_labels} labels"
        raise InputError(f"{settings.label_names}: {settings.load} was trained with {known}")
    return names


def names_beside(dev: str, num_labels: int) -> list[str]:
    """The labels' names, from the mapping that lies beside data/x-dev.txt, else their numbers."""
    path = Path(dev).with_name(f"{dataset_of(dev, 'dev')}-label-mapping.json")
    if path.is_file() and len(names := load_label_names(path)) == num_labels:
        return names
    return [str(label) for label in range(num_labels)]
