"""Compute the values that the three checks compare with from the formulas, in float64.

    .venv/bin/python tests/make_fixtures.py FOLDER

writes `rotary_embedding_actual.data`, `optimizer_test.npy`, and for the model in `data/demo/` its
`sanity_check.data`.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from reference_math import adamw, llama_forward, rotary_embedding

DEMO = Path(__file__).parent.parent / "data" / "demo"
DEMO_TOKENS = [[1, 365, 2047, 3, 900, 0, 0, 0], [1, 365, 58, 1201, 77, 640, 1999, 512]]


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


def sanity_fixture(checkpoint: Path) -> dict:
    """What a checkpoint's model computes of two rows of ids, without a mask and with one.

    Returns:
        the ids as `tokens` `(batch, seqlen)`; for `unmasked` and `causal` the `logits` of the last
        position `(batch, 1, vocab_size)` and the `hidden_states` `(batch, seqlen, dim)`.
    """
    saved = torch.load(checkpoint, weights_only=True)
    weights = {name: tensor.double().numpy() for name, tensor in saved["model"].items()}
    fixture = {"tokens": torch.tensor(DEMO_TOKENS)}
    for name in ("unmasked", "causal"):
        args = saved["model_args"] | {"causal": name == "causal"}
        logits, hidden = llama_forward(weights, np.array(DEMO_TOKENS), args)
        fixture[name] = {
            "logits": torch.from_numpy(logits[:, -1:]).float(),
            "hidden_states": torch.from_numpy(hidden).float(),
        }
    return fixture


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where to write the files")
    folder = parser.parse_args().folder
    torch.save(rotary_fixture(), folder / "rotary_embedding_actual.data")
    np.save(folder / "optimizer_test.npy", optimizer_fixture())
    torch.save(sanity_fixture(DEMO / "model.pt"), folder / "sanity_check.data")
