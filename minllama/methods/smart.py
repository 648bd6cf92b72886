"""SMART: smoothness-inducing regularization and the Bregman proximal step."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call

from minllama.common.settings import flag
from minllama.methods.recipe import Loss, Method, Recipe
from minllama.text.batches import Batch


@dataclass(frozen=True, kw_only=True)
class Smart(Method):
    """Add two regularizers to the loss."""

    title = "SMART (arXiv 1911.03437)"
    switch = "smart"

    smart: float = flag(
        0.0, "weight of the smoothness regularization; 0 turns SMART off", metavar="LAMBDA"
    )
    smart_steps: int = flag(1, "ascent steps of the perturbation", low=1)
    smart_radius: float = flag(
        0.1, "largest change of an element of an embedding, in deviations of the embedding matrix"
    )
    smart_step_size: float = flag(0.1, "size of an ascent step, in the same unit")
    smart_noise: float = flag(
        0.01,
        "deviation of the perturbation that the ascent starts from, in the same unit",
        low=1e-6,
    )
    smart_mu: float = flag(
        1.0, "weight of the divergence from the averaged model's predictions; 0 leaves it out"
    )
    smart_momentum: float = flag(
        0.99, "share of the averaged model that is kept at every step", high=1
    )

    def prepare(self, recipe: Recipe) -> None:
        loss = SmartLoss(self, recipe)
        recipe.loss = loss
        if self.smart_mu > 0:
            recipe.after_step.append(loss.update_average)
            recipe.kept |= {f"smart.{name}": mean for name, mean in loss.average.items()}


def symmetric_divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p‖q) + KL(q‖p), the sum over rows of log-probabilities `(batch, num_labels)`."""
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum()


class SmartLoss(Loss):
    """The loss of arXiv 1911.03437, equations 1 to 4.

        L + λ · max_{‖δ‖∞ ≤ ε} ℓ(f(x + δ), f(x)) + μ · ℓ(f(x), f̃(x))

    f gives the probabilities of the labels, ℓ is the symmetric divergence, δ is added to the
    embeddings, and f̃ has the moving average of the weights, θ̃ = β·θ̃ + (1 - β)·θ after each step.
    The regularizers are computed without dropout, so that they measure nothing else.

    Args:
        recipe: its loss is L.
    """

    def __init__(self, settings: Smart, recipe: Recipe):
        self.settings, self.model, self.loss = settings, recipe.model, recipe.loss
        self.batch_size = recipe.batch_size
        self.unit = recipe.model.llama.tok_embeddings.weight.detach().std().item()
        self.average = {
            name: p.detach().clone()
            for name, p in self.model.named_parameters()
            if p.requires_grad and settings.smart_mu > 0
        }
        self.log_probs = recipe.loss.log_probs

    def __call__(self, batch: Batch, model: nn.Module) -> torch.Tensor:
        """The regularized loss of a batch, a scalar."""
        loss = self.loss(batch, model)
        with evaluating(model):
            log_p = self.log_probs(batch, model)
            with self.perturbed(self.ascend(batch, model, log_p.detach())):
                log_q = self.log_probs(batch, model)
            divergence = self.settings.smart * symmetric_divergence(log_p, log_q)
            if self.settings.smart_mu > 0:
                with torch.no_grad():
                    log_average = self.log_probs(batch, self.averaged)
                divergence += self.settings.smart_mu * symmetric_divergence(log_p, log_average)
        return loss + divergence / self.batch_size  # as the loss, in a smaller batch too

    def ascend(self, batch: Batch, model: nn.Module, log_p: torch.Tensor) -> torch.Tensor:
        """The perturbation δ of the embeddings, `(batch, seqlen, dim)`, by projected ascent."""
        settings = self.settings
        shape = (*batch.token_ids.shape, self.model.llama.config.dim)
        radius, step_size = self.unit * settings.smart_radius, self.unit * settings.smart_step_size
        delta = settings.smart_noise * self.unit * torch.randn(shape, device=log_p.device)
        for _ in range(settings.smart_steps):
            delta.requires_grad_()
            with self.perturbed(delta):
                log_q = self.log_probs(batch, model)
            divergence = symmetric_divergence(log_p, log_q)
            (gradient,) = torch.autograd.grad(divergence, delta)
            largest = gradient.abs().amax(dim=(1, 2), keepdim=True).clamp_min(1e-30)
            delta = (delta + step_size * gradient / largest).clamp(-radius, radius).detach()
        return delta

    def perturbed(self, delta: torch.Tensor) -> contextlib.AbstractContextManager[None]:
        """A context in which δ is added to the embeddings of the batch."""
        return perturbed_embeddings(self.model.llama.tok_embeddings, delta)

    def averaged(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Predict with the averaged weights."""
        return functional_call(self.model, self.average, inputs)

    @torch.no_grad()
    def update_average(self, model: nn.Module, step: int) -> None:
        """θ̃ = β·θ̃ + (1 - β)·θ."""
        parameters = dict(model.named_parameters())
        for name, mean in self.average.items():
            mean.lerp_(parameters[name], 1 - self.settings.smart_momentum)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A context without dropout; the model is in training mode again after it."""
    model.eval()
    try:
        yield
    finally:
        model.train()


@contextlib.contextmanager
def perturbed_embeddings(embeddings: nn.Module, delta: torch.Tensor) -> Iterator[None]:
    """A context in which δ is added to the first output of the embeddings.

    Only to the first, because the tokens of a label are embedded after those of the prompt.
    """

    def add_delta(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        hook.remove()
        return output + delta

    hook = embeddings.register_forward_hook(add_delta)
    try:
        yield
    finally:
        hook.remove()
