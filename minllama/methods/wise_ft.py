"""WiSE-FT: weights between those before and those after fine-tuning."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from minllama.common.settings import flag
from minllama.methods.recipe import Method, Recipe


@dataclass(frozen=True, kw_only=True)
class WiseFT(Method):
    """Keep the weights before training; after it, choose the best mixture on dev.

    A new head begins as the embeddings of the label's words, so that the start means something.
    """

    title = "WiSE-FT (arXiv 2109.01903)"
    requires = frozenset({"label names"})
    excludes: ClassVar = {"added tensors": "where mixed weights mean nothing"}

    wise_ft: list[float] | None = flag(
        None,
        "after training, keep the best on dev of these mixtures: 0 is the start, 1 the end",
        high=1,
        nargs="+",
        metavar="ALPHA",
    )

    def prepare(self, recipe: Recipe) -> None:
        if hasattr(recipe.model, "classifier_head"):
            names = recipe.label_names
            ids = [recipe.tokenizer.encode(n, bos=False, eos=False, truncate=False) for n in names]
            start_head(recipe.model, ids)
        parameters = dict(recipe.model.named_parameters())
        start = {name: p.detach().clone() for name, p in parameters.items() if p.requires_grad}
        recipe.finish.append(lambda: self.keep_best(recipe, start))

    def keep_best(self, recipe: Recipe, start: dict[str, torch.Tensor]) -> None:
        """Evaluate every mixture, print the curve, and leave the best in the model."""
        parameters = dict(recipe.model.named_parameters())
        end = {name: parameters[name].detach().clone() for name in start}
        curve = {}
        for alpha in sorted(set(self.wise_ft)):
            mix(recipe.model, start, end, alpha)
            curve[alpha] = recipe.evaluate()
            print(f"alpha {alpha:g}: dev acc :: {curve[alpha]:.3f}")
        best = max(curve, key=lambda alpha: (curve[alpha], alpha))
        mix(recipe.model, start, end, best)
        print(f"keep alpha {best:g}")


@torch.no_grad()
def mix(model: nn.Module, start: dict, end: dict, alpha: float) -> None:
    """(1 - alpha) · start + alpha · end (arXiv 2109.01903, equation 1), for the tensors named."""
    parameters = dict(model.named_parameters())
    for name, tensor in start.items():
        parameters[name].copy_(torch.lerp(tensor, end[name], alpha))


@torch.no_grad()
def start_head(model: nn.Module, label_name_ids: list[list[int]]) -> None:
    """A label's row of the head becomes the mean embedding of its name's tokens, its bias zero."""
    embedding = model.llama.tok_embeddings.weight
    for label, ids in enumerate(label_name_ids):
        model.classifier_head.weight[label] = embedding[ids].mean(dim=0)
    model.classifier_head.bias.zero_()
