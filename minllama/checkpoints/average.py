"""Average the weights of several checkpoints of one model, in the precision of the first.

    .venv/bin/python -m minllama.checkpoints.average A.pt B.pt --out model.pt

The average of checkpoints from one training run, or from runs that began with the same weights,
often predicts better than each of them (arXiv 1803.05407, 2203.05482).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from config import LlamaConfig
from minllama.checkpoints import pt
from minllama.checkpoints.convert import in_dtype, tokenizer_for, write_files
from minllama.checkpoints.formats import load, tokenizer_beside
from minllama.checkpoints.layout import HEAD, Checkpoint
from minllama.common.errors import InputError
from minllama.common.files import check_outputs
from minllama.common.program import run_script, script_parser
from tokenizer import Tokenizer


def average(checkpoints: Sequence[Checkpoint], weights: Sequence[float]) -> Checkpoint:
    """The weighted mean of the tensors, computed in float32; the weights add up to 1."""
    first = checkpoints[0]
    for other in checkpoints[1:]:
        settings = settings_of(other.config)
        for name, expected in settings_of(first.config).items():
            if settings[name] != expected:
                message = f"{name} is {settings[name]}, but {expected} in {first.source}"
                raise InputError(f"{other.source}: its {message}; average checkpoints of one model")
    tensors = {}
    for name, tensor in first.tensors.items():
        tensors[name] = torch.zeros(tensor.shape)
        for checkpoint, weight in zip(checkpoints, weights, strict=True):
            tensors[name] += weight * checkpoint.tensors[name].float()
    return in_dtype(first._replace(tensors=tensors), first.tensors[HEAD].dtype)


def settings_of(config: LlamaConfig) -> dict[str, Any]:
    """The settings of a model, without the ways to state the same sizes differently."""
    sizes = {"hidden_dim": config.ffn_dim, "n_kv_heads": config.n_kv_heads or config.n_heads}
    return pt.model_args_of(config) | sizes | {"multiple_of": None, "ffn_dim_multiplier": None}


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("sources", nargs="+", metavar="CHECKPOINT", help="in any format")
    parser.add_argument("--out", required=True, metavar="FILE", help="the checkpoint to write")
    parser.add_argument("--weights", nargs="+", type=float, metavar="W", help="by default equal")
    args = parser.parse_args()
    weights = args.weights or [1.0] * len(args.sources)
    total = sum(weights)
    if len(weights) != len(args.sources) or min(weights) < 0 or not 0 < total < math.inf:
        raise InputError("--weights: expected a number of 0 or more for each checkpoint, not all 0")
    checkpoints = [load(source) for source in args.sources]
    tokenizers = [path for path in map(tokenizer_beside, args.sources) if path is not None]
    if len({path.read_bytes() for path in tokenizers}) > 1:
        raise InputError(f"{tokenizers[0]}: another checkpoint has another one; average one model")
    check_outputs([args.out], [*args.sources, *tokenizers])
    tokenizer_files = tokenizer_for(
        args.out, "pt", Tokenizer(tokenizer_model=tokenizers[0]) if tokenizers else None
    )
    pt.save(average(checkpoints, [weight / total for weight in weights]), args.out)
    write_files(tokenizer_files)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_script(main)
