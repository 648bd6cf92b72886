"""Meta's folders: `params.json` with one `consolidated.00.pth`, as of Llama 2 7B."""

from pathlib import Path
from typing import Any

import torch

from minllama.checkpoints import layout
from minllama.checkpoints.layout import HEAD, Checkpoint
from minllama.checkpoints.pt import canonical_name, read_checkpoint
from minllama.common.errors import InputError

PARAMS, SHARDS = "params.json", "consolidated.*.pth"
CONTEXT = 4096  # of Llama 2; params.json does not have it
KNOWN = (
    "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of",
    "ffn_dim_multiplier", "norm_eps", "rope_theta", "max_seq_len",
)  # fmt: skip


def recognizes(path: str | Path) -> bool:
    """Whether a path is a folder with a params.json and shards, or one of the shards."""
    return bool(shards_of(path))


def shards_of(path: str | Path) -> list[Path]:
    """The shards of a model in their order; none if the path is in another format."""
    path = Path(path)
    folder = path.parent if path.match(SHARDS) else path
    return sorted(folder.glob(SHARDS)) if (folder / PARAMS).is_file() else []


def load(path: str | Path) -> Checkpoint:
    """Read a folder, or raise an `InputError`."""
    file, *more = shards_of(path)
    folder = file.parent
    if more:
        raise InputError(
            f"{folder}: a model in {1 + len(more)} parts; fetch its Hugging Face folder"
        )
    tensors: dict[str, Any] = {}
    for name, tensor in read_checkpoint(file, mapped=True).items():
        if not layout.is_buffer(str(name)):
            tensors[canonical_name(str(name))] = tensor
    arguments = read_params(folder / PARAMS)
    if arguments.get("vocab_size", -1) == -1:
        head = tensors.get(HEAD)
        arguments["vocab_size"] = len(head) if isinstance(head, torch.Tensor) and head.dim() else 0
    config = layout.config_from(arguments, folder / PARAMS)
    return layout.build_checkpoint(config, tensors, folder)


def read_params(path: Path) -> dict[str, Any]:
    """The arguments of `LlamaConfig` in `params.json`."""
    params = layout.read_json(path)
    unknown = [name for name, x in params.items() if name not in KNOWN and x not in (None, False)]
    if unknown:
        raise InputError(f"{path}: not supported: {', '.join(unknown)}")
    defaults = {"causal": True, "n_kv_heads": None, "multiple_of": 256, "max_seq_len": CONTEXT}
    return defaults | {name: value for name, value in params.items() if value is not None}
