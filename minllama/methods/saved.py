"""A fine-tuned classifier on disk: settings, trained weights, and how to load them."""

import hashlib
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from minllama import methods
from minllama.checkpoints.layout import is_finite, is_float_tensor
from minllama.checkpoints.pt import read_checkpoint, write_checkpoint
from minllama.common.errors import InputError
from minllama.common.settings import Settings, to_plain
from minllama.methods.base import Method
from minllama.text.labelled import MAX_LABELS
from minllama.training import distributed
from minllama.training.run import like_parameter, trained_tensors

FORMER_NAMES = {".attention.attend.prefix_": ".attention.prefix_"}  # of tensors, in version 0.1


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(Settings):
    """The arguments of the classifiers, as they are saved.

    Attributes:
        option: "finetune", or "pretrain" for a frozen Llama (the assignment's old word).
        label_names: None where they are unknown.
        init_weights: whether to draw the initial weights before they are loaded, so that later
            random draws are the assignment's.
        tokenizer: the tokenizer's fingerprint; None if it is unknown, as in version 0.2.
        methods: the methods of the training.
    """

    pretrained_model_path: str
    num_labels: int
    option: str
    hidden_dropout_prob: float
    causal: bool | None = None
    label_names: list[str] | None = None
    init_weights: bool = True
    tokenizer: str | None = None
    methods: tuple[Method, ...] = ()

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

    def to_dict(self) -> dict[str, Any]:
        """All values, with the flags of methods in place of `methods`."""
        values = super().to_dict()
        del values["methods"]
        return values | methods.flag_values(self.methods)


def save_model(
    model: nn.Module,
    optimizer: Optimizer,
    args: Any,
    config: Any,
    filepath: str | Path,
    **more: Any,
) -> None:
    """Save weights, optimizer, settings and generator states, as tensors and plain values."""
    distributed.reshard(model)
    kind, keys, *rest = np.random.get_state()
    saved = {
        "model": distributed.full_tensors(trained_tensors(model)),
        "frozen": frozen_digest(model),
        "optim": distributed.full_tensors(optimizer.state_dict()),
        "args": plain_values(args),
        "model_config": plain_values(config),
        "system_rng": random.getstate(),
        "numpy_rng": (kind, torch.from_numpy(np.asarray(keys, np.int64)), *rest),
        "torch_rng": torch.random.get_rng_state(),
        **more,
    }
    distributed.on_rank0(lambda: write_checkpoint(saved, filepath))
    print(f"save the model to {filepath}")


def plain_values(settings: Any) -> dict[str, Any]:
    """Settings, or the attributes of any object, as a checkpoint can hold them."""
    if isinstance(settings, Settings):
        return settings.to_dict()
    if isinstance(settings, Mapping):
        return {name: to_plain(value) for name, value in settings.items()}
    names = [name for name in dir(settings) if not name.startswith("_")]
    values = {name: getattr(settings, name, None) for name in names}  # those of its class too
    return {name: to_plain(value) for name, value in values.items() if not callable(value)}


def read_classifier(path: str | Path) -> tuple[dict[str, Any], ClassifierConfig]:
    """Read what `save_model` saved, and its checked configuration.

    Raises:
        InputError: the file is something else.
    """
    saved = read_checkpoint(path)
    if not all(isinstance(saved.get(part), dict) for part in ("model", "args", "model_config")):
        raise InputError(f"{path}: not a file that --option finetune saved")
    values = saved["model_config"]
    try:
        active = methods.active_methods(values)
        config = ClassifierConfig(**ClassifierConfig.select_fields(values) | {"methods": active})
    except (InputError, TypeError) as error:  # a wrong value, or none
        raise InputError(f"{path}: {error}: not a file that --option finetune saved") from error
    for old, new in FORMER_NAMES.items():
        saved["model"] = {str(n).replace(old, new): tensor for n, tensor in saved["model"].items()}
    return saved, config


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


def check_frozen(model: nn.Module, saved: dict[str, Any], path: str, checkpoint: str) -> None:
    """Check that a model's frozen weights are those that a saved classifier was trained on.

    Raises:
        InputError: they are not.
    """
    digests = [None, frozen_digest(model)]  # version 0.1 saved none
    if saved["model_config"].get("keep_bfloat16"):  # of version 0.2
        digests.append(frozen_bfloat16_digest(model))
    if saved.get("frozen") not in digests:
        raise InputError(
            f"{path}: trained on other weights than {checkpoint}; "
            "name them with --pretrained-model-path"
        )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """The numbers of trained and of all parameters."""
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return trained, sum(p.numel() for p in parameters)
