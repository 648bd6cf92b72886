"""Average the weights of several checkpoints of one model.

    .venv/bin/python -m minllama.checkpoints.average A.pt B.pt --out model.pt

Checkpoints of one training, or of trainings that began with the same weights, have an average that
often predicts better than each of them (arXiv 1803.05407, 2203.05482). It is written in the layout
of `stories42M.pt`, in the precision of the first one, and the tokenizer is put beside it.
"""

import math
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

import torch

from minllama.checkpoints import pt
from minllama.checkpoints.convert import check_target, in_dtype, tokenizer_for, write_beside
from minllama.checkpoints.formats import load, tokenizer_beside
from minllama.checkpoints.layout import HEAD, Checkpoint
from minllama.common.errors import InputError
from minllama.common.program import ArgumentParser, run_script

ALIKE = ("dim", "n_layers", "n_heads", "ffn_dim", "vocab_size", "max_seq_len")
ALIKE += ("layer_norm_eps", "rope_theta", "causal", "tie_embeddings")


def average(checkpoints: Sequence[Checkpoint], weights: Sequence[float]) -> Checkpoint:
    """The weighted mean of the tensors, computed in float32, in the first one's precision.

    Args:
        weights: one for each checkpoint; they add up to 1.

    Raises:
        InputError: the models are not of one kind, or a value is too large for that precision.
    """
    first = checkpoints[0]
    for other in checkpoints[1:]:
        see_alike(first, other)
    tensors = {}
    for name, tensor in first.tensors.items():
        tensors[name] = torch.zeros(tensor.shape)
        for checkpoint, weight in zip(checkpoints, weights, strict=True):
            tensors[name] += weight * checkpoint.tensors[name].float()
    return in_dtype(first._replace(tensors=tensors), first.tensors[HEAD].dtype)


def see_alike(first: Checkpoint, other: Checkpoint) -> None:
    """See that two models compute the same but for their weights.

    Raises:
        InputError: a setting differs.
    """
    a, b = first.config, other.config
    settings = {name: (getattr(a, name), getattr(b, name)) for name in ALIKE}
    settings["n_kv_heads"] = (a.n_kv_heads or a.n_heads, b.n_kv_heads or b.n_heads)
    for name, (expected, found) in settings.items():
        if found != expected:
            raise InputError(
                f"{other.source}: its {name} is {found}, {first.source} has {expected}"
            )


def see_tokenizers(sources: Sequence[str]) -> Path | None:
    """The tokenizer beside the checkpoints, or None where none has one.

    Raises:
        InputError: two differ.
    """
    beside = [path for path in map(tokenizer_beside, sources) if path is not None]
    for path in beside[1:]:
        if path.read_bytes() != beside[0].read_bytes():
            raise InputError(f"{path}: another tokenizer than {beside[0]}")
    return beside[0] if beside else None


def normalized(weights: Sequence[float] | None, n: int) -> list[float]:
    """Weights that add up to 1; None gives all the same.

    Raises:
        InputError: there are not `n`, one is negative, or they have no finite sum over 0.
    """
    weights = [1.0] * n if weights is None else list(weights)
    if len(weights) != n:
        raise InputError(f"--weights: {len(weights)} for {n} checkpoints")
    total = sum(weights)
    if not (min(weights) >= 0 and 0 < total < math.inf):
        raise InputError("--weights: need numbers of 0 or more, with a finite sum over 0")
    return [weight / total for weight in weights]


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="in any format")
    parser.add_argument("--out", required=True, metavar="FILE")
    help = "the share of each, if they are not to be equal"
    parser.add_argument("--weights", nargs="+", type=float, metavar="W", help=help)
    args = parser.parse_args()
    weights = normalized(args.weights, len(args.checkpoints))
    tokenizer = see_tokenizers(args.checkpoints)
    for source in args.checkpoints:
        check_target(source, args.out, "pt", tokenizer_beside(source))
    beside = tokenizer_for(args.out, "pt", tokenizer)
    pt.save(average([load(source) for source in args.checkpoints], weights), args.out)
    write_beside(beside)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_script(main)
