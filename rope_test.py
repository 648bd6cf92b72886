"""Check `rope.apply_rotary_emb` against the assignment's values, and on random ones; a script."""

if __name__ == "__main__":  # the imports below take seconds
    from minllama.common.program import end_at_interrupt

    end_at_interrupt()

import sys

import numpy as np
import torch

from minllama.common.program import run_script
from rope import apply_rotary_emb


def expected_rotation(x: np.ndarray, theta: float) -> np.ndarray:
    """Equation 15 of RoFormer (arXiv 2104.09864) in float64: each pair by its own 2 × 2 matrix.

    Args:
        x: `(batch, seqlen, heads, head_dim)`.
    """
    out = np.empty_like(x)
    _, seqlen, _, head_dim = x.shape
    for position in range(seqlen):
        for i in range(0, head_dim, 2):
            angle = position / theta ** (i / head_dim)
            cos, sin = np.cos(angle), np.sin(angle)
            rotation = np.array([[cos, -sin], [sin, cos]])
            out[:, position, :, i : i + 2] = x[:, position, :, i : i + 2] @ rotation.T
    return out


def compare(actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    """Exit with a message and code 1 if query or key is wrong."""
    for name, ours, theirs in zip(("query", "key"), actual, expected, strict=True):
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs, atol=1e-5, rtol=1e-3):
            sys.exit(f"Rotary embedding test failed: {name} is\n{ours}\nexpected\n{theirs}")


def main() -> None:
    query, key = 2 * torch.ones(1, 2, 2, 4), 3 * torch.ones(1, 2, 2, 4)
    expected = torch.load("rotary_embedding_actual.data", weights_only=True)
    compare(apply_rotary_emb(query, key, head_dim=4, max_seq_len=20), expected)
    print("Rotary embedding test passed!")

    rng = np.random.default_rng(0)
    query_values, key_values = rng.normal(size=(2, 7, 4, 8)), rng.normal(size=(2, 7, 2, 8))
    query, key = torch.tensor(query_values).float(), torch.tensor(key_values).float()
    theta = 5e5
    expected = tuple(
        torch.tensor(expected_rotation(x, theta)).float() for x in (query_values, key_values)
    )
    compare(apply_rotary_emb(query, key, head_dim=8, max_seq_len=16, theta=theta), expected)
    print("It also rotates random values, longer sequences and fewer key heads correctly.")


if __name__ == "__main__":
    run_script(main)
