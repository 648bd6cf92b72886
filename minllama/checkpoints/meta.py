"""Meta's folders: `params.json` with `consolidated.00.pth`, and more of these for large models."""

from pathlib import Path
from typing import Any

import torch

from config import LlamaConfig
from minllama.checkpoints.integrity import is_zip
from minllama.checkpoints.layout import (
    EMBEDDING,
    HEAD,
    Checkpoint,
    checked,
    read_json,
    see_layers,
    shapes_of,
)
from minllama.checkpoints.pt import canonical_name, read_checkpoint
from minllama.common.errors import InputError, is_out_of_memory

PARAMS, SHARDS = "params.json", "consolidated.*.pth"
CONTEXT = 4096  # of Llama 2; params.json does not tell it
FREQUENCIES = "rope.freqs"  # computed from theta here
KNOWN = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of")
KNOWN += ("ffn_dim_multiplier", "norm_eps", "rope_theta", "max_seq_len")
CUT_BY_COLUMNS = ("attention.compute_output.weight", "feed_forward.w2.weight")


def reads(path: str | Path) -> bool:
    """Whether a path is such a folder, or one of its shards."""
    return folder_of(path) is not None


def folder_of(path: str | Path) -> Path | None:
    path = Path(path)
    for folder in (path, path.parent):
        is_named = folder == path or path.match(SHARDS)
        if is_named and (folder / PARAMS).is_file() and any(folder.glob(SHARDS)):
            return folder
    return None


def files_with_sums(path: str | Path) -> list[Path]:
    """The shards, which `torch.save` wrote with checksums."""
    return [file for file in sorted(folder_of(path).glob(SHARDS)) if is_zip(file)]


def load(path: str | Path) -> Checkpoint:
    """Read a folder; shards are put together.

    Raises:
        InputError: it is no Llama 2, or it is damaged; the message says where.
    """
    folder = folder_of(path)
    if folder is None:
        raise InputError(f"{path}: no {PARAMS} and {SHARDS} in it")
    shards = [read_shard(file) for file in sorted(folder.glob(SHARDS))]
    arguments = read_params(folder / PARAMS)
    if arguments.get("vocab_size", -1) == -1:
        arguments["vocab_size"] = sum(len(shard.get(HEAD, ())) for shard in shards)
    try:
        config = LlamaConfig.from_model_args(arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"{folder / PARAMS}: describes no Llama: {error}") from error
    see_layers(config, len(shards[0]), folder)
    expected = shapes_of(config)
    tensors = {}
    for name in shards[0]:
        parts = [shard.get(name) for shard in shards]
        if any(part is None for part in parts):
            raise InputError(f"{folder}: {name} is not in all of the {len(shards)} shards")
        tensors[name] = joined(name, parts, expected.get(name))
    others = set().union(*shards) - shards[0].keys()
    if others:
        raise InputError(f"{folder}: {min(others)} is not in all of the {len(shards)} shards")
    return checked(config, tensors, folder)


def read_shard(file: Path) -> dict[str, torch.Tensor]:
    """A shard's tensors by this repository's names."""
    tensors = {}
    for name, tensor in read_checkpoint(file, mapped=True).items():
        if name == FREQUENCIES:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise InputError(f"{file}: {name} is no tensor")
        tensors[canonical_name(str(name))] = tensor
    return tensors


def joined(name: str, parts: list[torch.Tensor], expected: tuple[int, ...] | None) -> torch.Tensor:
    """A tensor from its parts in all shards.

    Matrices that make more are cut by rows, those that make less by columns, and norms are in every
    shard. The embedding is cut by columns in Llama 2.
    """
    if len(parts) == 1 or parts[0].dim() == 1:
        return parts[0]
    by_columns = name.endswith(CUT_BY_COLUMNS)
    if name == EMBEDDING and expected is not None:
        by_columns = len(parts[0]) == expected[0]
    try:
        return torch.cat(parts, dim=1 if by_columns else 0)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return parts[0]  # of another shape than expected, which will be said


def read_params(path: Path) -> dict[str, Any]:
    """The arguments of `LlamaConfig` that `params.json` gives."""
    params = read_json(path)
    unknown = [name for name, x in params.items() if name not in KNOWN and x not in (None, False)]
    if unknown:
        raise InputError(f"{path}: not understood: {', '.join(unknown)}")
    defaults = {"causal": True, "n_kv_heads": None, "multiple_of": 256, "max_seq_len": CONTEXT}
    return defaults | {name: value for name, value in params.items() if value is not None}
