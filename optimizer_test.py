"""Check `optimizer.AdamW` against precomputed weights; run as a script."""

if __name__ == "__main__":  # the imports below take seconds
    from minllama.common.program import end_at_interrupt

    end_at_interrupt()

import sys

import numpy as np
import torch

from minllama.common.program import run_script
from optimizer import AdamW


def train_linear(n_steps: int = 1000) -> torch.Tensor:
    """Fit a linear map to `x ↦ [x0 + x1, -x2]`; returns its weight `(2, 3)`."""
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


def main() -> None:
    actual = train_linear()
    expected = torch.from_numpy(np.load("optimizer_test.npy"))
    if not torch.allclose(actual, expected, atol=1e-5, rtol=1e-3):
        sys.exit(f"Optimizer test failed: the weights are\n{actual}\nexpected\n{expected}")
    print("Optimizer test passed!")


if __name__ == "__main__":
    run_script(main)
