"""Files that `torch.save` wrote, in the layout of `stories42M.pt`, read without running code."""

import re
from pathlib import Path
from typing import Any

import torch

from config import LlamaConfig
from minllama.checkpoints import integrity
from minllama.checkpoints.layout import Checkpoint, build_checkpoint, config_from, is_buffer
from minllama.common.errors import (
    FOR_LOADING,
    InputError,
    explain_out_of_memory,
    is_out_of_memory,
    missing_file,
)
from minllama.common.files import atomic_write

MODEL_ARGS = (
    "dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim", "multiple_of",
    "ffn_dim_multiplier", "max_seq_len", "vocab_size", "layer_norm_eps", "rope_theta",
    "causal", "tie_embeddings", "bos_token_id", "eos_token_id", "tokenizer",
)  # fmt: skip
OTHER_NAMES = {  # llama2.c's, and ours
    "attention.wq.": "attention.compute_query.",
    "attention.wk.": "attention.compute_key.",
    "attention.wv.": "attention.compute_value.",
    "attention.wo.": "attention.compute_output.",
}


def recognizes(path: str | Path) -> bool:
    """Whether a path is a file; `read_checkpoint` checks its content."""
    return Path(path).is_file()


def load(path: str | Path) -> Checkpoint:
    """Read a Llama: a dict of tensors as `model`, and `LlamaConfig`'s arguments as `model_args`."""
    saved = read_checkpoint(path, mapped=True)
    if isinstance(saved.get("model_config"), dict):
        return load_backbone(saved, path)
    for key in ("model_args", "model"):
        if not isinstance(saved.get(key), dict):
            raise InputError(f"{path}: no dict {key!r} in it, so it is not a Llama checkpoint")
    config = config_from(saved["model_args"], f"{path}: model_args")
    tensors: dict[str, Any] = {}
    for name, tensor in saved["model"].items():
        name = canonical_name(str(name))
        if is_buffer(name):
            continue
        if name in tensors:
            raise InputError(f"{path}: {name} is there twice")
        tensors[name] = tensor
    return build_checkpoint(config, tensors, path, saved["model_args"].get("tie_embeddings"))


def load_backbone(saved: dict[str, Any], path: str | Path) -> Checkpoint:
    """The Llama of a fine-tuned classifier; its base checkpoint says which shape it has."""
    values, prefix = saved["model_config"], "llama."
    tuning, base = values.get("tune", "full"), Path(str(values.get("pretrained_model_path")))
    if tuning != "full" or not isinstance(saved.get("model"), dict):
        raise InputError(
            f"{path}: has only the weights that --tune {tuning} trained; use it with --load"
        )
    places = [base, Path(path).parent / base]
    found = [place for place in places if place.is_file() and not place.samefile(path)]
    if not found:
        raise InputError(f"{path}: fine-tuned from {base}, which is needed too; put it beside it")
    config = load(found[0]).config
    config.causal = config.causal if values.get("causal") is None else bool(values["causal"])
    config.tokenizer = values.get("tokenizer") or config.tokenizer
    tensors = {str(name): tensor for name, tensor in saved["model"].items()}
    tensors = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
    return build_checkpoint(config, tensors, path)


def save(checkpoint: Checkpoint, path: str | Path) -> None:
    """Write a checkpoint in the layout that `load` reads; a tied matrix is stored once."""
    saved = {"model": checkpoint.tensors, "model_args": model_args_of(checkpoint.config)}
    write_checkpoint(saved, path)


def model_args_of(config: LlamaConfig) -> dict[str, Any]:
    """The config as plain values, as a checkpoint stores it."""
    return {name: getattr(config, name) for name in MODEL_ARGS}


def canonical_name(name: str) -> str:
    """This project's name of a tensor that `torch.compile`, DDP or llama2.c may have named."""
    name = re.sub(r"\b(_orig_mod|module)\.", "", name)
    for theirs, ours in OTHER_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def read_checkpoint(path: str | Path, *, mapped: bool = False) -> dict:
    """Load a dict that `torch.save` wrote, without ever running code from the file.

    Args:
        mapped: leave the tensors in the file, mapped into memory.

    Raises:
        FileNotFoundError: the file does not exist.
        InputError: it is damaged, or not a dict of tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise missing_file(path)
    integrity.check(path)
    try:
        with (
            explain_out_of_memory(f"loading {path}", FOR_LOADING),
            torch.serialization.safe_globals(integrity.REPLACED),
        ):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        if isinstance(error, OSError) or is_out_of_memory(error):
            raise
        raise InputError(f"{path}: PyTorch cannot read it: {error}") from error
    if not isinstance(checkpoint, dict):
        raise InputError(f"{path}: a {type(checkpoint).__name__}, expected a checkpoint's dict")
    return checkpoint


def write_checkpoint(saved: dict, path: str | Path) -> None:
    """Save a dict of tensors and plain values; after an `OSError` a previous file remains."""
    with atomic_write(path, "wb") as file:
        try:
            torch.save(saved, file)
        except RuntimeError as error:
            # After a failed write PyTorch's zip writer fails again when it closes.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
