"""Common to all formats: a config with its tensors, their names and shapes, and checks."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from config import LlamaConfig
from minllama.common.errors import InputError
from minllama.common.progress import progress_bar

EMBEDDING, HEAD = "tok_embeddings.weight", "output.weight"
# Masks and rotary tables that older files have; they are computed here.
BUFFERS = (
    "attention.mask", "rope.freqs", "rotary_emb.inv_freq", "freqs_cos", "freqs_sin", "freqs_cis"
)  # fmt: skip


class Checkpoint(NamedTuple):
    """A config with the tensors of its model, which may lie in a file mapped into memory.

    A tied embedding and head are both there, as one tensor. `source` is the path, for messages.
    """

    config: LlamaConfig
    tensors: dict[str, torch.Tensor]
    source: str


def shapes_of(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a model, by name, without building the model."""
    dim, hidden_dim = config.dim, config.ffn_dim
    kv_dim = (config.n_kv_heads or config.n_heads) * (dim // config.n_heads)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, dim)}
    for i in range(config.n_layers):
        shapes |= {
            f"layers.{i}.attention.compute_query.weight": (dim, dim),
            f"layers.{i}.attention.compute_key.weight": (kv_dim, dim),
            f"layers.{i}.attention.compute_value.weight": (kv_dim, dim),
            f"layers.{i}.attention.compute_output.weight": (dim, dim),
            f"layers.{i}.feed_forward.w1.weight": (hidden_dim, dim),
            f"layers.{i}.feed_forward.w2.weight": (dim, hidden_dim),
            f"layers.{i}.feed_forward.w3.weight": (hidden_dim, dim),
            f"layers.{i}.attention_norm.weight": (dim,),
            f"layers.{i}.ffn_norm.weight": (dim,),
        }
    return shapes | {"norm.weight": (dim,), HEAD: (config.vocab_size, dim)}


def config_from(arguments: dict[str, Any], path: str | Path) -> LlamaConfig:
    """Build the config that a file describes, or raise an `InputError`."""
    try:
        return LlamaConfig.from_model_args(arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: does not describe a Llama: {error}") from error


def is_buffer(name: str) -> bool:
    """Whether a tensor is computed from the config, and no weight."""
    return name.endswith(BUFFERS)


def build_checkpoint(
    config: LlamaConfig, tensors: Mapping[str, Any], path: str | Path, tied: bool | None = None
) -> Checkpoint:
    """Check that the tensors of a file are those of its model, and tie embedding and head.

    Args:
        tied: whether the file says so; None if it does not. Unless False, one of them is enough.

    Raises:
        InputError: names, shapes or values are not as expected; the message has the first ten.
    """
    shapes = shapes_of(config)
    errors = []
    for name, value in progress_bar(tensors.items(), desc="check", unit=" tensors", delay=1):
        errors += tensor_errors(name, value, shapes.get(name))
    missing = shapes.keys() - tensors.keys()
    if tied is not False and len(missing & {EMBEDDING, HEAD}) == 1:
        missing -= {EMBEDDING, HEAD}
    errors += [f"{name} is missing" for name in sorted(missing)]
    if errors:
        more = [f"and {len(errors) - 10} more"] if len(errors) > 10 else []
        raise InputError(f"{path}: not the tensors of its model: {'; '.join(errors[:10] + more)}")
    embedding = tensors.get(EMBEDDING, tensors.get(HEAD))
    head = tensors.get(HEAD, embedding)
    are_equal = head is embedding or torch.equal(head, embedding)
    if tied and not are_equal:
        raise InputError(f"{path}: {EMBEDDING} and {HEAD} differ, but are said to be tied")
    config.tie_embeddings = are_equal if tied is None else tied
    if config.tie_embeddings:
        embedding = head
    return Checkpoint(config, {**tensors, EMBEDDING: embedding, HEAD: head}, str(path))


def tensor_errors(name: str, value: Any, shape: tuple[int, ...] | None) -> list[str]:
    """The error of one tensor, or an empty list. `shape` is None where the name is unknown."""
    if shape is None:
        return [f"{name} is unexpected"]
    if not is_float_tensor(value):
        return [f"{name} is not a tensor of floating-point numbers"]
    if tuple(value.shape) != shape:
        return [f"{name} has shape {tuple(value.shape)}, expected {shape}"]
    return [] if is_finite(value) else [f"{name} has values that are not finite"]


def is_float_tensor(value: object) -> bool:
    """Whether a value is an ordinary tensor of floating-point numbers."""
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    return isinstance(value, torch.Tensor) and value.dtype in dtypes


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are finite in float32, whose range float64 exceeds."""
    # The sum of infinite values is not finite, and is much faster to compute. It may also overflow.
    is_likely = tensor.sum(dtype=torch.float32).isfinite()
    return bool(is_likely or tensor.float().isfinite().all())


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file, or raise an `InputError`."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
