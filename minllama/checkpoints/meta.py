"""Meta's folders: `params.json` with `consolidated.00.pth`, and more shards for large models."""

from pathlib import Path
from typing import Any

import torch

from minllama.checkpoints import layout
from minllama.checkpoints.layout import EMBEDDING, HEAD, Checkpoint
from minllama.checkpoints.pt import canonical_name, read_checkpoint
from minllama.common.errors import InputError, is_out_of_memory

PARAMS, SHARDS = "params.json", "consolidated.*.pth"
CONTEXT = 4096  # of Llama 2; params.json does not have it
KNOWN = (
    "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of",
    "ffn_dim_multiplier", "norm_eps", "rope_theta", "max_seq_len",
)  # fmt: skip
SPLIT_BY_COLUMNS = ("attention.compute_output.weight", "feed_forward.w2.weight")


def reads(path: str | Path) -> bool:
    """Whether a path is such a folder, or one of its shards."""
    return bool(shards_of(path))


def shards_of(path: str | Path) -> list[Path]:
    """The shards of a model in their order; none if the path is in another format."""
    path = Path(path)
    folder = path.parent if path.match(SHARDS) else path
    return sorted(folder.glob(SHARDS)) if (folder / PARAMS).is_file() else []


def load(path: str | Path) -> Checkpoint:
    """Read a folder and join its shards, or raise an `InputError`."""
    files = shards_of(path)
    folder = files[0].parent
    shards = [read_shard(file) for file in files]
    arguments = read_params(folder / PARAMS)
    if arguments.get("vocab_size", -1) == -1:
        heads = [shard[HEAD] for shard in shards if HEAD in shard]
        arguments["vocab_size"] = sum(len(head) for head in heads if head.dim() == 2)
    config = layout.config_from(arguments, folder / PARAMS)
    shapes = layout.shapes_of(config)
    for shard in shards:
        different = shard.keys() ^ shards[0].keys()
        if different:
            raise InputError(f"{folder}: {min(different)} is not in all of the shards")
    tensors = {}
    for name in shards[0]:
        tensors[name] = joined(name, [shard[name] for shard in shards], shapes.get(name))
    return layout.build_checkpoint(config, tensors, folder)


def read_shard(file: Path) -> dict[str, torch.Tensor]:
    """Read a shard's tensors, by this project's names."""
    tensors = {}
    for name, tensor in read_checkpoint(file, mapped=True).items():
        if layout.is_buffer(str(name)):
            continue
        if not isinstance(tensor, torch.Tensor):
            raise InputError(f"{file}: {name} is not a tensor")
        tensors[canonical_name(str(name))] = tensor
    return tensors


def joined(name: str, parts: list[torch.Tensor], shape: tuple[int, ...] | None) -> torch.Tensor:
    """Join the parts of a tensor.

    Shards split the matrices that produce queries, keys, values and hidden units by rows, and those
    that consume them by columns. Each has the whole norms. Llama 2 splits the embedding by columns.
    """
    if len(parts) == 1 or parts[0].dim() != 2:
        return parts[0]
    by_columns = name.endswith(SPLIT_BY_COLUMNS)
    if name == EMBEDDING and shape is not None:
        by_columns = len(parts[0]) == shape[0]
    try:
        return torch.cat(parts, dim=1 if by_columns else 0)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return parts[0]  # `build_checkpoint` refuses its shape


def read_params(path: Path) -> dict[str, Any]:
    """The arguments of `LlamaConfig` in `params.json`."""
    params = layout.read_json(path)
    unknown = [name for name, x in params.items() if name not in KNOWN and x not in (None, False)]
    if unknown:
        raise InputError(f"{path}: not supported: {', '.join(unknown)}")
    defaults = {"causal": True, "n_kv_heads": None, "multiple_of": 256, "max_seq_len": CONTEXT}
    return defaults | {name: value for name, value in params.items() if value is not None}
