"""WiSE-FT: interpolate between the weights before and after fine-tuning."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from classifier import LlamaEmbeddingClassifier
from minllama.common.settings import flag
from minllama.methods.base import Method, TrainState


@dataclass(frozen=True, kw_only=True)
class WiseFT(Method):
    """Keep the weights before training; after it, choose the best interpolation on dev.

    A new head starts as the embeddings of the labels' words, so that the start means something.
    """

    title = "WiSE-FT (arXiv 2109.01903)"
    needs_label_names = True
    excludes: ClassVar = {"added tensors": "where interpolated weights mean nothing"}

    wise_ft: list[float] | None = flag(
        None,
        "keep the best interpolation on dev: 0 is before training, 1 after",
        high=1,
        nargs="+",
        metavar="ALPHA",
    )

    def before_training(self, training: TrainState) -> None:
        """Initialize a new head, and remember the weights."""
        if isinstance(training.model, LlamaEmbeddingClassifier):
            encode = training.classifier.tokenizer.encode
            names = training.classifier.config.label_names or []
            ids = [encode(name, bos=False, eos=False, truncate=False) for name in names]
            start_head(training.model, ids)
        for name, parameter in training.model.named_parameters():
            if parameter.requires_grad:
                training.method_constants[f"wise_ft.{name}"] = parameter.detach().clone()

    def after_training(self, training: TrainState) -> bool:
        """Evaluate every interpolation, print the curve, and leave the best in the model."""
        start, end = {}, {}
        for name, parameter in training.model.named_parameters():
            if parameter.requires_grad:
                start[name] = training.method_constants[f"wise_ft.{name}"]
                end[name] = parameter.detach().clone()
        curve = {}
        for alpha in sorted(set(self.wise_ft or ())):
            interpolate(training.model, start, end, alpha)
            curve[alpha] = training.classifier.evaluate(training.dev_loader).accuracy
            print(f"alpha {alpha:g}: dev acc :: {curve[alpha]:.3f}")
        best = max(curve, key=lambda alpha: (curve[alpha], alpha))
        interpolate(training.model, start, end, best)
        print(f"keep alpha {best:g}")
        return True


@torch.no_grad()
def interpolate(model: nn.Module, start: dict, end: dict, alpha: float) -> None:
    """Set the weights to (1 - alpha) · start + alpha · end (arXiv 2109.01903, equation 1)."""
    parameters = dict(model.named_parameters())
    for name, tensor in start.items():
        parameters[name].copy_(torch.lerp(tensor, end[name], alpha))


@torch.no_grad()
def start_head(model: LlamaEmbeddingClassifier, label_name_ids: list[list[int]]) -> None:
    """Set each label's row of the head to the mean embedding of its name, and the bias to 0."""
    embedding = model.llama.tok_embeddings.weight
    for label, ids in enumerate(label_name_ids):
        model.classifier_head.weight[label] = embedding[ids].mean(dim=0)
    model.classifier_head.bias.zero_()
