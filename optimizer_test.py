"""Check `optimizer.AdamW` against the assignment's weights, and its definition; a script."""

if __name__ == "__main__":  # the imports below take seconds
    from minllama.common.program import end_at_interrupt

    end_at_interrupt()

import itertools
import sys
from typing import Any

import numpy as np
import torch

from minllama.common.program import run_script
from optimizer import AdamW

SETTINGS: dict[str, Any] = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 0.05, "weight_decay": 0.3}
N_STEPS = 4


def train_linear(n_steps: int = 1000) -> torch.Tensor:
    """Fit a linear map to `x ↦ [x0 + x1, -x2]`; return its weight `(2, 3)`."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = torch.nn.Linear(3, 2, bias=False)
    optimizer = AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4, correct_bias=True)
    for _ in range(n_steps):
        optimizer.zero_grad()
        x = torch.tensor(rng.uniform(size=3), dtype=torch.float32)
        target = torch.stack((x[0] + x[1], -x[2]))
        loss = ((model(x) - target) ** 2).sum()
        loss.backward()
        optimizer.step()
    return model.weight.detach()


def expected_weights(
    p: np.ndarray,
    gradients: np.ndarray,
    settings: dict[str, Any],
    *,
    folded: bool,
    decay_first: bool,
) -> np.ndarray:
    """Take the steps of AdamW (arXiv 1711.05101, algorithm 2) in float64.

    Args:
        gradients: one for each step, `(n_steps, *p.shape)`.
        folded: whether the bias correction is folded into the step size (end of section 2 of
            arXiv 1412.6980), so that eps is not corrected.
        decay_first: whether the decay precedes the update.
    """
    lr, (beta1, beta2), eps = settings["lr"], settings["betas"], settings["eps"]
    decay = lr * settings["weight_decay"]
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, gradient in enumerate(gradients, start=1):
        m = beta1 * m + (1 - beta1) * gradient
        v = beta2 * v + (1 - beta2) * gradient**2
        eps_t = eps / np.sqrt(1 - beta2**t) if folded else eps
        update = lr * m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + eps_t)
        p = (1 - decay) * p - update if decay_first else (1 - decay) * (p - update)
    return p


def check_definition() -> None:
    """Exit with a message and code 1 if two groups of parameters are updated wrongly."""
    rng = np.random.default_rng(0)
    starts, gradients = rng.normal(size=(2, 5)), rng.normal(size=(2, N_STEPS, 5))
    changes: tuple[dict[str, Any], ...] = ({}, {"lr": 0.05, "weight_decay": 0.0})
    parameters = [torch.nn.Parameter(torch.tensor(start).float()) for start in starts]
    groups = [{"params": [p], **change} for p, change in zip(parameters, changes, strict=True)]
    optimizer = AdamW(groups, **SETTINGS)
    for step in range(N_STEPS):
        for p, gradient in zip(parameters, gradients[:, step], strict=True):
            p.grad = torch.tensor(gradient).float()
        optimizer.step()
    actual = np.stack([p.detach().numpy() for p in parameters])
    # All four readings of the paper are right.
    for folded, decay_first in itertools.product((True, False), repeat=2):
        expected = np.stack(
            [
                expected_weights(
                    start, gradient, SETTINGS | change, folded=folded, decay_first=decay_first
                )
                for start, gradient, change in zip(starts, gradients, changes, strict=True)
            ]
        )
        if np.allclose(actual, expected, atol=1e-5, rtol=1e-4):
            return
    sys.exit(f"Optimizer test failed: two groups of parameters are\n{actual}\nexpected\n{expected}")


def main() -> None:
    actual = train_linear()
    expected = torch.from_numpy(np.load("optimizer_test.npy"))
    if not torch.allclose(actual, expected, atol=1e-5, rtol=1e-3):
        sys.exit(f"Optimizer test failed: the weights are\n{actual}\nexpected\n{expected}")
    print("Optimizer test passed!")
    check_definition()
    print("It also decays weights and updates several groups as AdamW is defined.")


if __name__ == "__main__":
    run_script(main)
