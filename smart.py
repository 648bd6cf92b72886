"""SMART: smoothness-inducing regularization and the Bregman proximal step."""

import argparse
import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.func import functional_call

from recipe import Recipe
from utils import adder, number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = adder(parser.add_argument_group("SMART"))
    positive = number(float, 0)
    help = "weight of the smoothness regularization; 0 turns SMART off"
    add("--smart", type=positive, default=0.0, metavar="LAMBDA", help=help)
    add("--smart_steps", type=number(int, 1), default=1, help="ascent steps of the perturbation")
    help = "largest change of an element of an embedding, in deviations of the embedding matrix"
    add("--smart_radius", type=positive, default=0.1, help=help)
    help = "size of an ascent step, in the same unit"
    add("--smart_step_size", type=positive, default=0.1, help=help)
    help = "deviation of the perturbation that the ascent starts from, in the same unit"
    add("--smart_noise", type=number(float, 1e-6), default=0.01, help=help)
    help = "weight of the divergence from the averaged model's predictions; 0 leaves it out"
    add("--smart_mu", type=positive, default=1.0, help=help)
    help = "share of the averaged model that is kept at every step"
    add("--smart_momentum", type=number(float, 0, 1), default=0.99, help=help)


def prepare(recipe: Recipe) -> None:
    """Add the regularizers to the loss."""
    if recipe.args.smart == 0:
        return
    smart = Smart(recipe)
    recipe.loss = smart
    if recipe.args.smart_mu > 0:
        recipe.after_step.append(smart.update_average)


def symmetric_divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p‖q) + KL(q‖p), the sum over rows of log-probabilities `(batch, num_labels)`."""
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum()


class Smart:
    """The loss of arXiv 1911.03437, equations 1 to 4.

        L + λ · max_{‖δ‖∞ ≤ ε} ℓ(f(x + δ), f(x)) + μ · ℓ(f(x), f̃(x))

    f gives the probabilities of the labels, ℓ is the symmetric divergence, δ is added to the
    embeddings, and f̃ has the moving average of the weights, θ̃ = β·θ̃ + (1 - β)·θ after each step.
    The regularizers are computed without dropout, so that they measure nothing else.
    """

    def __init__(self, recipe: Recipe):
        self.args, self.model = recipe.args, recipe.model
        self.loss, self.log_probs = recipe.loss, recipe.log_probs
        embedding = recipe.model.llama.tok_embeddings
        self.unit = embedding.weight.detach().std().item()
        self.average = {
            name: p.detach().clone()
            for name, p in self.model.named_parameters()
            if p.requires_grad and self.args.smart_mu > 0
        }

    def __call__(self, batch: dict, model: nn.Module) -> torch.Tensor:
        """The regularized loss of a batch, a scalar."""
        loss = self.loss(batch, model)
        with evaluating(model):
            log_p = self.log_probs(batch, model)
            with perturbed(model, self.ascend(batch, model, log_p.detach())):
                log_q = self.log_probs(batch, model)
            divergence = self.args.smart * symmetric_divergence(log_p, log_q)
            if self.args.smart_mu > 0:
                with torch.no_grad():
                    log_average = self.log_probs(batch, self.averaged)
                divergence += self.args.smart_mu * symmetric_divergence(log_p, log_average)
        return loss + divergence / self.args.batch_size  # as the loss, in a smaller batch too

    def ascend(self, batch: dict, model: nn.Module, log_p: torch.Tensor) -> torch.Tensor:
        """The perturbation δ of the embeddings, `(batch, seqlen, dim)`, by projected ascent."""
        rows, seqlen = batch["token_ids"].shape
        shape = (rows, seqlen, self.model.llama.config.dim)
        radius, step_size = (
            self.unit * x for x in (self.args.smart_radius, self.args.smart_step_size)
        )
        delta = self.args.smart_noise * self.unit * torch.randn(shape, device=log_p.device)
        for _ in range(self.args.smart_steps):
            delta.requires_grad_()
            with perturbed(model, delta):
                divergence = symmetric_divergence(log_p, self.log_probs(batch, model))
            (gradient,) = torch.autograd.grad(divergence, delta)
            largest = gradient.abs().amax(dim=(1, 2), keepdim=True).clamp_min(1e-30)
            delta = (delta + step_size * gradient / largest).clamp(-radius, radius).detach()
        return delta

    def averaged(self, *inputs: torch.Tensor) -> torch.Tensor:
        """What the averaged model predicts."""
        return functional_call(self.model, self.average, inputs)

    @torch.no_grad()
    def update_average(self, model: nn.Module, step: int) -> None:
        """θ̃ = β·θ̃ + (1 - β)·θ."""
        parameters = dict(model.named_parameters())
        for name, mean in self.average.items():
            mean.lerp_(parameters[name], 1 - self.args.smart_momentum)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, and training again afterwards."""
    model.eval()
    try:
        yield
    finally:
        model.train()


@contextlib.contextmanager
def perturbed(model: nn.Module, delta: torch.Tensor) -> Iterator[None]:
    """Add δ to the embeddings of the next pass over sentences."""
    passes = iter([delta])

    def add(_module: nn.Module, _inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        return output + next(passes, 0)  # a label's tokens, which follow, are not changed

    handle = model.llama.tok_embeddings.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
