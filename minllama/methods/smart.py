"""SMART: smoothness-inducing regularization and the Bregman proximal step."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call

from minllama.common.settings import flag
from minllama.methods.base import Method, TrainState
from minllama.text.batches import Batch


@dataclass(frozen=True, kw_only=True)
class Smart(Method):
    """Add two regularizers to the loss (arXiv 1911.03437, equations 1 to 4).

        L + λ · max_{‖δ‖∞ ≤ ε} ℓ(f(x + δ), f(x)) + μ · ℓ(f(x), f̃(x))

    f gives the probabilities of the labels, ℓ is the symmetric divergence, δ is added to the
    embeddings, and f̃ has the moving average of the weights, θ̃ = β·θ̃ + (1 - β)·θ after each step.
    The regularizers are computed without dropout, so that they measure nothing else.
    """

    title = "SMART (arXiv 1911.03437)"
    switch = "smart"

    smart: float = flag(
        0.0, "weight of the smoothness regularizer; 0 turns SMART off", metavar="LAMBDA"
    )
    smart_steps: int = flag(1, "gradient ascent steps of the perturbation", low=1)
    smart_radius: float = flag(
        0.1, "bound of the perturbation, in standard deviations of the embeddings"
    )
    smart_step_size: float = flag(0.1, "ascent step size, in standard deviations of the embeddings")
    smart_noise: float = flag(
        0.01, "initial noise, in standard deviations of the embeddings", low=1e-6
    )
    smart_mu: float = flag(1.0, "weight of the divergence from the averaged model")
    smart_momentum: float = flag(0.99, "momentum of the averaged model", high=1)

    def before_training(self, training: TrainState) -> None:
        """Measure the embeddings, and start the average at the weights."""
        embeddings = training.model.llama.tok_embeddings.weight
        training.method_constants["smart.unit"] = embeddings.detach().std().cpu()
        if self.smart_mu > 0:
            for name, parameter in training.model.named_parameters():
                if parameter.requires_grad:
                    training.method_state[f"smart.{name}"] = parameter.detach().clone()

    def loss(self, training: TrainState, batch: Batch, loss: torch.Tensor) -> torch.Tensor:
        """Add the regularizers."""
        with evaluating(training.model):
            log_p = training.log_probs(batch)
            delta = self.ascend(training, batch, log_p.detach())
            with perturbed_embeddings(training.model.llama.tok_embeddings, delta):
                log_q = training.log_probs(batch)
            divergence = self.smart * symmetric_divergence(log_p, log_q)
            if self.smart_mu > 0:
                with torch.no_grad():
                    log_average = training.log_probs(batch, averaged_model(training))
                divergence += self.smart_mu * symmetric_divergence(log_p, log_average)
        return loss + divergence / training.settings.batch_size  # as the loss in a smaller batch

    def ascend(self, training: TrainState, batch: Batch, log_p: torch.Tensor) -> torch.Tensor:
        """Find the perturbation δ `(batch, seqlen, dim)` by projected gradient ascent."""
        unit = training.method_constants["smart.unit"].item()
        radius, step_size = unit * self.smart_radius, unit * self.smart_step_size
        shape = (*batch.token_ids.shape, training.model.llama.config.dim)
        delta = self.smart_noise * unit * torch.randn(shape, device=log_p.device)
        for _ in range(self.smart_steps):
            delta.requires_grad_()
            with perturbed_embeddings(training.model.llama.tok_embeddings, delta):
                log_q = training.log_probs(batch)
            (gradient,) = torch.autograd.grad(symmetric_divergence(log_p, log_q), delta)
            largest = gradient.abs().amax(dim=(1, 2), keepdim=True).clamp_min(1e-30)
            delta = (delta + step_size * gradient / largest).clamp(-radius, radius).detach()
        return delta

    @torch.no_grad()
    def after_step(self, training: TrainState, step: int) -> None:
        """Update the average, θ̃ = β·θ̃ + (1 - β)·θ."""
        for name, parameter in training.model.named_parameters():
            if f"smart.{name}" in training.method_state:
                training.method_state[f"smart.{name}"].lerp_(parameter, 1 - self.smart_momentum)


def symmetric_divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p‖q) + KL(q‖p), summed over log-probabilities `(batch, num_labels)`."""
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum()


def averaged_model(training: TrainState) -> Callable[..., torch.Tensor]:
    """The classifier with the averaged weights."""
    prefix = "smart."
    average = {
        name.removeprefix(prefix): tensor
        for name, tensor in training.method_state.items()
        if name.startswith(prefix)
    }

    def predict(*inputs: torch.Tensor | None) -> torch.Tensor:
        return functional_call(training.model, average, inputs)

    return predict


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
