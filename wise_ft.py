"""WiSE-FT: weights between those before and those after fine-tuning."""

import argparse

import torch
from torch import nn

from recipe import Recipe
from utils import InputError, adder, number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = adder(parser.add_argument_group("WiSE-FT"))
    help = "after training, keep the best on dev of these mixtures: 0 is the start, 1 the end"
    add("--wise_ft", type=number(float, 0, 1), nargs="+", metavar="ALPHA", help=help)


def prepare(recipe: Recipe) -> None:
    """Keep the weights before training; after it, choose the best mixture.

    A new head begins as the embeddings of the label's words, so that the start means something.

    Raises:
        InputError: mixtures of what trains are not between the two models.
    """
    if recipe.args.wise_ft is None:
        return
    if recipe.args.tune in ("lora", "adapter", "prefix"):
        raise InputError(f"--wise_ft: with --tune {recipe.args.tune} mixed weights mean nothing")
    if hasattr(recipe.model, "classifier_head"):
        ids = [recipe.tokenizer.encode(name, False, False) for name in recipe.label_names]
        start_head(recipe.model, ids)
    start = {
        name: p.detach().clone() for name, p in recipe.model.named_parameters() if p.requires_grad
    }

    def choose() -> None:
        """Evaluate every mixture, print the curve, and leave the best in the model."""
        end = {name: dict(recipe.model.named_parameters())[name].detach().clone() for name in start}
        curve = {}
        for alpha in sorted(set(recipe.args.wise_ft)):
            mix(recipe.model, start, end, alpha)
            curve[alpha] = recipe.evaluate()
            print(f"alpha {alpha:g}: dev acc :: {curve[alpha]:.3f}")
        best = max(curve, key=lambda alpha: (curve[alpha], alpha))
        mix(recipe.model, start, end, best)
        print(f"keep alpha {best:g}")

    recipe.finish.append(choose)


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
