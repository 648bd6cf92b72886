"""Check `rope.apply_rotary_emb` against precomputed values; run as a script."""

if __name__ == "__main__":  # the imports below take seconds
    from minllama.common.program import end_at_interrupt

    end_at_interrupt()

import sys

import torch

from minllama.common.program import run_script
from rope import apply_rotary_emb


def main() -> None:
    query, key = 2 * torch.ones(1, 2, 2, 4), 3 * torch.ones(1, 2, 2, 4)
    actual = apply_rotary_emb(query, key, head_dim=4, max_seq_len=20)
    expected = torch.load("rotary_embedding_actual.data", weights_only=True)
    for name, ours, theirs in zip(("query", "key"), actual, expected, strict=True):
        if not torch.allclose(ours, theirs, atol=1e-5, rtol=1e-3):
            sys.exit(f"Rotary embedding test failed: {name} is\n{ours}\nexpected\n{theirs}")
    print("Rotary embedding test passed!")


if __name__ == "__main__":
    run_script(main)
