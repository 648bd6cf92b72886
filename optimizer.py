"""AdamW, by hand."""

import math
from collections.abc import Callable, Iterable

import torch
from torch.optim import Optimizer


class AdamW(Optimizer):
    """Adam (arXiv 1412.6980) with decoupled weight decay (arXiv 1711.05101).

    For the gradient g at step t:

        m = β1·m + (1 - β1)·g
        v = β2·v + (1 - β2)·g²
        p = p - α·m / (√v + ε),   α = lr·√(1 - β2^t) / (1 - β1^t)
        p = p - lr·weight_decay·p

    α folds the bias correction into the step size (end of section 2 of Kingma & Ba), so ε is not
    rescaled by the correction, unlike in their Algorithm 1. Decay acts on the updated parameter.

    Args:
        params: parameters, or dicts of parameter groups with their own settings.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the denominator.
        weight_decay: decoupled weight decay.
        correct_bias: False leaves the correction out (α = lr), as BERT's original code does.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ):
        if not lr >= 0.0:  # also refuses NaN
            raise ValueError(f"Invalid learning rate: {lr} - should be >= 0.0")
        for beta in betas:
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter: {beta} - should be in [0.0, 1.0)")
        if not eps >= 0.0:
            raise ValueError(f"Invalid epsilon value: {eps} - should be >= 0.0")
        if not weight_decay >= 0.0:
            raise ValueError(f"Invalid weight decay: {weight_decay} - should be >= 0.0")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "correct_bias": correct_bias,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(  # type: ignore[override]  # torch declares a float
        self, closure: Callable[[], torch.Tensor] | None = None
    ) -> torch.Tensor | None:
        """Update every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            the loss that `closure` returned, else None.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.next_state(p, p.grad)
                m, v, t = state["exp_avg"], state["exp_avg_sq"], state["step"]

                m.mul_(beta1).add_(p.grad, alpha=1 - beta1)
                v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                step_size = group["lr"]
                if group["correct_bias"]:
                    step_size *= math.sqrt(1 - beta2**t) / (1 - beta1**t)
                p.addcdiv_(m, v.sqrt().add_(group["eps"]), value=-step_size)
                if group["weight_decay"] > 0:
                    # Adding keeps the precision that multiplying by 1 - lr·weight_decay would
                    # lose: at 1 - 1e-7 float32 rounds.
                    p.add_(p, alpha=-group["lr"] * group["weight_decay"])
        return loss

    def next_state(self, p: torch.nn.Parameter, gradient: torch.Tensor) -> dict:
        """Return a parameter's state, created at its first gradient, with its step counted."""
        if gradient.is_sparse:
            raise RuntimeError("AdamW does not support sparse gradients")
        state = self.state[p]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
        state["step"] += 1
        return state
