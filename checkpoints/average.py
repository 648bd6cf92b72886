"""Average the weights of several checkpoints of one model.

    .venv/bin/python -m checkpoints.average A.pt B.pt --out model.pt

Checkpoints of one training, or of trainings that began with the same weights, have an average that
often predicts better than each of them (arXiv 1803.05407, 2203.05482). It is written in the layout
of `stories42M.pt`, in the precision of the first one, and the tokenizer is put beside it.
"""

import math
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

import torch

from checkpoints import pt
from checkpoints.convert import check_target, tokenizer_for
from checkpoints.formats import load, tokenizer_beside
from checkpoints.layout import EMBEDDING, HEAD, Checkpoint
from common.errors import InputError
from common.files import atomic_write
from common.program import ArgumentParser, run_script


def average(checkpoints: Sequence[Checkpoint], weights: Sequence[float]) -> Checkpoint:
    """The weighted mean of the tensors, computed in float32.

    Args:
        weights: one for each checkpoint; they add up to 1.

    Raises:
        InputError: the models are not of one kind.
    """
    first = checkpoints[0]
    for other in checkpoints[1:]:
        if pt.model_args_of(other.config) != pt.model_args_of(first.config):
            raise InputError(f"{other.source}: not a model of the kind of {first.source}")
    tensors = {}
    for name, tensor in first.tensors.items():
        mean = torch.zeros(tensor.shape)
        for checkpoint, weight in zip(checkpoints, weights, strict=True):
            mean += weight * checkpoint.tensors[name].float()
        tensors[name] = mean.to(tensor.dtype)
    if first.config.tie_embeddings:
        tensors[EMBEDDING] = tensors[HEAD]
    return first._replace(tensors=tensors)


def see_tokenizers(sources: Sequence[str]) -> Path | None:
    """The tokenizer beside the first checkpoint.

    Raises:
        InputError: that beside another one differs.
    """
    first, *others = [tokenizer_beside(source) for source in sources]
    for source, other in zip(sources[1:], others, strict=True):
        if first and other and first.read_bytes() != other.read_bytes():
            raise InputError(f"{source}: another tokenizer beside it than beside {sources[0]}")
    return first


def normalized(weights: Sequence[float] | None, n: int) -> list[float]:
    """Weights that add up to 1; None gives all the same.

    Raises:
        InputError: there are not `n`, or they have no positive sum.
    """
    weights = [1.0] * n if weights is None else list(weights)
    if len(weights) != n:
        raise InputError(f"--weights: {len(weights)} for {n} checkpoints")
    total = sum(weights)
    if not 0 < total < math.inf:
        raise InputError(f"--weights: their sum is {total:g}; it must be over 0")
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
    for path, content in beside.items():
        with atomic_write(path, "wb") as file:
            file.write(content)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_script(main)
