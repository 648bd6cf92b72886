"""Average the weights of several checkpoints of one model.

    .venv/bin/python -m minllama.checkpoints.average A.pt B.pt --out model.pt

The average of checkpoints from one training run, or from runs that began with the same weights,
often predicts better than each of them (arXiv 1803.05407, 2203.05482). It is written in the layout
of `stories42M.pt`, in the precision of the first checkpoint, with the tokenizer beside it.
"""

import math
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

import torch

from minllama.checkpoints import pt
from minllama.checkpoints.convert import check_target, in_dtype, tokenizer_for, write_files
from minllama.checkpoints.formats import load, tokenizer_beside
from minllama.checkpoints.layout import HEAD, Checkpoint
from minllama.common.errors import InputError
from minllama.common.program import ArgumentParser, run_script

SETTINGS = (
    *("dim", "n_layers", "n_heads", "ffn_dim", "vocab_size", "max_seq_len"),
    *("layer_norm_eps", "rope_theta", "causal", "tie_embeddings"),
)


def average(checkpoints: Sequence[Checkpoint], weights: Sequence[float]) -> Checkpoint:
    """The weighted mean of the tensors, computed in float32, in the precision of the first.

    Args:
        weights: one for each checkpoint; they add up to 1.

    Raises:
        InputError: the models have different settings, or that precision cannot hold a value.
    """
    first = checkpoints[0]
    for other in checkpoints[1:]:
        check_same_settings(first, other)
    tensors = {}
    for name, tensor in first.tensors.items():
        tensors[name] = torch.zeros(tensor.shape)
        for checkpoint, weight in zip(checkpoints, weights, strict=True):
            tensors[name] += weight * checkpoint.tensors[name].float()
    return in_dtype(first._replace(tensors=tensors), first.tensors[HEAD].dtype)


def check_same_settings(first: Checkpoint, other: Checkpoint) -> None:
    """Check that two models differ only in their weights."""
    a, b = first.config, other.config
    settings = {name: (getattr(a, name), getattr(b, name)) for name in SETTINGS}
    settings["n_kv_heads"] = (a.n_kv_heads or a.n_heads, b.n_kv_heads or b.n_heads)
    for name, (expected, found) in settings.items():
        if found != expected:
            raise InputError(
                f"{other.source}: its {name} is {found}, but {first.source} has {expected}"
            )


def common_tokenizer(sources: Sequence[str]) -> Path | None:
    """The one tokenizer beside the checkpoints, or None where none has one."""
    tokenizers = [path for path in map(tokenizer_beside, sources) if path is not None]
    for path in tokenizers[1:]:
        if path.read_bytes() != tokenizers[0].read_bytes():
            raise InputError(f"{path}: not the same tokenizer as {tokenizers[0]}")
    return tokenizers[0] if tokenizers else None


def normalized(weights: Sequence[float] | None, n: int) -> list[float]:
    """Scale `n` weights to the sum 1; None stands for equal ones."""
    weights = [1.0] * n if weights is None else list(weights)
    if len(weights) != n:
        raise InputError(f"--weights: {len(weights)} for {n} checkpoints")
    total = sum(weights)
    if not (min(weights) >= 0 and 0 < total < math.inf):
        raise InputError("--weights: need numbers of 0 or more, with a positive and finite sum")
    return [weight / total for weight in weights]


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="in any format")
    parser.add_argument("--out", required=True, metavar="FILE", help="the checkpoint to write")
    help = "weight of each checkpoint, by default equal"
    parser.add_argument("--weights", nargs="+", type=float, metavar="W", help=help)
    args = parser.parse_args()
    weights = normalized(args.weights, len(args.checkpoints))
    tokenizer = common_tokenizer(args.checkpoints)
    for source in args.checkpoints:
        check_target(source, args.out, "pt", tokenizer_beside(source))
    tokenizer_files = tokenizer_for(args.out, "pt", tokenizer)
    pt.save(average([load(source) for source in args.checkpoints], weights), args.out)
    write_files(tokenizer_files)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_script(main)
