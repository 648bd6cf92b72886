"""Compute `rotary_embedding_actual.data` and `optimizer_test.npy` from the formulas, in float64.

.venv/bin/python tests/make_fixtures.py FOLDER
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from reference_math import adamw, rotary_embedding


def rotary_fixture() -> tuple[torch.Tensor, torch.Tensor]:
    """The rotated query and key of `rope_test.py`, each `(1, 2, 2, 4)`."""
    ones = np.ones((1, 2, 2, 4))
    query, key = rotary_embedding(2 * ones), rotary_embedding(3 * ones)
    return torch.from_numpy(query).float(), torch.from_numpy(key).float()


def optimizer_fixture() -> np.ndarray:
    """The weight `(2, 3)` that `optimizer_test.py` ends with."""
    torch.manual_seed(0)
    start = torch.nn.Linear(3, 2, bias=False).weight.detach().numpy()
    inputs = np.random.default_rng(0).uniform(size=(1000, 3))

    def gradient(step, weight):
        x = inputs[step - 1]
        error = weight @ x - np.array([x[0] + x[1], -x[2]])
        return 2 * np.outer(error, x)

    weight = adamw(
        start,
        gradient,
        n_steps=1000,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-6,
        weight_decay=1e-4,
        correct_bias=True,
    )
    return weight.astype(np.float32)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where to write the two files")
    folder = parser.parse_args().folder
    torch.save(rotary_fixture(), folder / "rotary_embedding_actual.data")
    np.save(folder / "optimizer_test.npy", optimizer_fixture())
