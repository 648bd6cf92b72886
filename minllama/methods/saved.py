"""A fine-tuned classifier on disk: settings, trained weights, and how to load them."""

import hashlib
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from minllama.checkpoints.layout import is_finite, is_float_tensor
from minllama.checkpoints.pt import read_checkpoint, write_checkpoint
from minllama.common.errors import InputError
from minllama.common.flags import TaskSettings, dataset_name
from minllama.common.settings import Settings, to_plain
from minllama.methods import active_methods, former_names
from minllama.methods.base import Method
from minllama.text.labelled import MAX_LABELS, load_label_names
from minllama.training import distributed
from minllama.training.run import like_parameter, trained_tensors


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(Settings):
    """The arguments of the classifiers, as they are saved.

    Attributes:
        option: "finetune", or "pretrain" for a frozen Llama (the assignment's old word).
        label_names: None where they are unknown.
        init_weights: whether to draw the initial weights before they are loaded, so that later
            random draws are the assignment's.
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
class SavedClassifier:
    """The content of a file that fine-tuning saved.

    Attributes:
        weights: the trained tensors.
        frozen: the digest of the others (`frozen_digest`); None in files of version 0.1.
        kept_bfloat16: whether version 0.2 may have left frozen matrices in the file's bfloat16.
        args: the flags of the run.
    """

    path: str
    weights: dict[str, torch.Tensor]
    frozen: str | None
    kept_bfloat16: bool
    args: dict[str, Any]
    config: ClassifierConfig
    methods: tuple[Method, ...]


def save_model(
    model: nn.Module, optimizer: Optimizer, args: Any, config: Any, filepath: str | Path
) -> None:
    """Save weights, optimizer, settings and generator states, as tensors and plain values."""
    save_classifier(classifier_dict(model, optimizer, args, config), filepath)


def save_classifier(saved: dict[str, Any], filepath: str | Path) -> None:
    """Write a classifier checkpoint, and print its path."""
    distributed.on_rank0(lambda: write_checkpoint(saved, filepath))
    print(f"save the model to {filepath}")


def classifier_dict(
    model: nn.Module, optimizer: Optimizer, args: Any, config: Any
) -> dict[str, Any]:
    """The checkpoint of a classifier: weights, optimizer, settings, random generators."""
    distributed.reshard(model)
    kind, keys, *rest = np.random.get_state()
    return {
        "model": distributed.full_tensors(trained_tensors(model)),
        "frozen": frozen_digest(model),
        "optim": distributed.full_tensors(optimizer.state_dict()),
        "args": plain_values(args),
        "model_config": plain_values(config),
        "system_rng": random.getstate(),
        "numpy_rng": (kind, torch.from_numpy(np.asarray(keys, np.int64)), *rest),
        "torch_rng": torch.random.get_rng_state(),
    }


def plain_values(settings: Any) -> dict[str, Any]:
    """Settings, or the attributes of any object, as a checkpoint can hold them."""
    if isinstance(settings, dict):
        return {name: to_plain(value) for name, value in settings.items()}
    if isinstance(settings, Settings):
        return settings.to_dict()
    return {name: to_plain(value) for name, value in vars(settings).items()}


def read_classifier(path: str | Path) -> SavedClassifier:
    """Read and check what `save_model` saved.

    Raises:
        InputError: the file is something else.
    """
    saved = read_checkpoint(path)
    if not all(isinstance(saved.get(part), dict) for part in ("model", "args", "model_config")):
        raise InputError(f"{path}: not a file that --option finetune saved")
    values = saved["model_config"]
    try:
        methods = active_methods(values)
        missing = [name for name in REQUIRED if name not in values]
        if missing:
            raise InputError(f"{', '.join(missing)} is missing")
        config = ClassifierConfig(**ClassifierConfig.known(values))
        if not isinstance(saved.get("frozen"), str | None):
            raise InputError("the digest of the frozen weights is no text")
    except InputError as error:
        raise InputError(f"{path}: {error}: not a file that --option finetune saved") from error
    weights = {}
    for name, tensor in saved["model"].items():
        for old, new in former_names(methods).items():
            name = str(name).replace(old, new)
        weights[name] = tensor
    kept_bfloat16 = values.get("keep_bfloat16") is True
    frozen = saved.get("frozen")
    return SavedClassifier(
        str(path), weights, frozen, kept_bfloat16, saved["args"], config, methods
    )


def load_weights(model: nn.Module, saved: dict[str, torch.Tensor], path: str | Path) -> None:
    """Load what `trained_tensors` returned into a model of the same settings.

    Raises:
        InputError: these are not its trained tensors.
    """
    for name, tensor in saved.items():
        if not is_float_tensor(tensor):
            raise InputError(f"{path}: {name} is no tensor of floating-point numbers")
        if not is_finite(tensor):
            raise InputError(f"{path}: {name} has values that are not finite in float32")
    trained = trained_tensors(model)
    expected = {name: tensor.shape for name, tensor in trained.items()}
    if {name: tensor.shape for name, tensor in saved.items()} != expected:
        raise InputError(f"{path}: its tensors are not those that its settings describe")
    with torch.no_grad():
        for name, tensor in trained.items():
            tensor.copy_(like_parameter(saved[name], tensor))


def frozen_digest(model: nn.Module) -> str:
    """SHA-256 of the tensors that do not train, which identifies the weights trained on."""
    return digest_of(p.detach() for p in model.parameters() if not p.requires_grad)


def frozen_bfloat16_digest(model: nn.Module) -> str:
    """The digest of version 0.2 for linear layers in bfloat16, which untied the output head."""
    tensors = []
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad:
                dtype = torch.bfloat16 if isinstance(module, nn.Linear) else torch.float32
                tensors.append(parameter.detach().to(dtype))
    return digest_of(tensors)


def digest_of(tensors: Iterable[torch.Tensor]) -> str:
    """SHA-256 of the bytes of some tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        digest.update(whole.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """The numbers of trained and of all parameters."""
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return trained, sum(p.numel() for p in parameters)


def check_frozen(model: nn.Module, saved: SavedClassifier, checkpoint: str) -> None:
    """Check that a model's frozen weights are those that a classifier was trained on.

    Raises:
        InputError: they are not.
    """
    digests = [None, frozen_digest(model)]
    if saved.kept_bfloat16:
        digests.append(frozen_bfloat16_digest(model))
    if saved.frozen not in digests:
        raise InputError(
            f"{saved.path}: trained on other weights than {checkpoint}; "
            "name them with --pretrained-model-path"
        )


def config_to_load(saved: SavedClassifier, settings: TaskSettings) -> ClassifierConfig:
    """The configuration of a saved classifier, with the paths and names that flags override.

    Raises:
        InputError: the flags name other labels.
    """
    config = saved.config.replace(
        init_weights=False, pretrained_model_path=settings.pretrained_model_path
    )
    if "label_names" not in settings.explicit:
        return config
    names = load_label_names(settings.label_names)
    if len(names) != config.num_labels or config.label_names not in (None, names):
        known = config.label_names or f"{config.num_labels} labels"
        raise InputError(f"{settings.label_names}: {saved.path} was trained with {known}")
    return config.replace(label_names=names)


def label_names_or_numbers(config: ClassifierConfig, dev: str) -> list[str]:
    """The labels' names: saved, or from the mapping beside dev; else their numbers."""
    if config.label_names is not None:
        return config.label_names
    path = Path(dev).with_name(f"{dataset_name(dev, 'dev')}-label-mapping.json")
    names = load_label_names(path) if path.is_file() else []
    if len(names) == config.num_labels:
        return names
    return [str(label) for label in range(config.num_labels)]
