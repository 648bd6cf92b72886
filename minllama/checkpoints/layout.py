"""What all formats share: a config and its tensors, their names and shapes, and their check."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from config import LlamaConfig
from minllama.common.errors import InputError
from minllama.common.progress import Bar

EMBEDDING, HEAD = "tok_embeddings.weight", "output.weight"
LAYER_NAMES = (  # in each layer, in the order of `Llama`
    "attention.compute_query.weight",
    "attention.compute_key.weight",
    "attention.compute_value.weight",
    "attention.compute_output.weight",
    "feed_forward.w1.weight",
    "feed_forward.w2.weight",
    "feed_forward.w3.weight",
    "attention_norm.weight",
    "ffn_norm.weight",
)
MANY_LAYERS = 1000  # more than any model has; up to here each missing tensor is named


class Checkpoint(NamedTuple):
    """A model as files have it.

    Attributes:
        config: `tie_embeddings` is as the tensors are.
        tensors: by this repository's names; where embedding and head are tied, both are there, as
            one tensor. They may lie in a file that is mapped into memory.
        source: the path, for messages.
    """

    config: LlamaConfig
    tensors: dict[str, torch.Tensor]
    source: str


def shapes_of(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a model, by name, without making one."""
    dim, hidden_dim = config.dim, config.ffn_dim
    kv_dim = (config.n_kv_heads or config.n_heads) * (dim // config.n_heads)
    of_a_layer = dict(
        zip(
            LAYER_NAMES,
            (
                *((dim, dim), (kv_dim, dim), (kv_dim, dim), (dim, dim)),
                *((hidden_dim, dim), (dim, hidden_dim), (hidden_dim, dim)),
                *((dim,), (dim,)),
            ),
            strict=True,
        )
    )
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, dim)}
    for i in range(config.n_layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in of_a_layer.items()}
    return shapes | {"norm.weight": (dim,), HEAD: (config.vocab_size, dim)}


def checked(
    config: LlamaConfig, tensors: Mapping[str, Any], path: str | Path, tied: bool | None = None
) -> Checkpoint:
    """See that a file's tensors are those of its model, and whether embedding and head are one.

    Args:
        tensors: by this repository's names. One of embedding and head is enough where they are
            tied.
        tied: what the file says of that; None says nothing.

    Raises:
        InputError: names, shapes or values are not as expected; the message names the first ten.
    """
    see_layers(config, len(tensors), path)
    expected = shapes_of(config)
    complaints = []
    progress = {"desc": "check", "unit": " tensors", "delay": 1}
    for name, tensor in Bar(tensors.items(), **progress):
        if name not in expected:
            complaints.append(f"{name} is unexpected")
        elif not is_dense(tensor):
            complaints.append(f"{name} is no tensor of floating-point numbers")
        elif tuple(tensor.shape) != expected[name]:
            complaints.append(f"{name} has shape {tuple(tensor.shape)}, expected {expected[name]}")
        elif not is_finite(tensor):
            complaints.append(f"{name} has values that are not finite")
    absent = expected.keys() - tensors.keys()
    if tied is not False and len(absent & {EMBEDDING, HEAD}) == 1:
        absent -= {EMBEDDING, HEAD}
    complaints += [f"{name} is missing" for name in sorted(absent)]
    if complaints:
        raise InputError(f"{path}: not the tensors of its model: {shortened(complaints)}")
    embedding = tensors.get(EMBEDDING, tensors.get(HEAD))
    head = tensors.get(HEAD, embedding)
    are_equal = head is embedding or torch.equal(head, embedding)
    if tied and not are_equal:
        raise InputError(f"{path}: {EMBEDDING} differs from {HEAD}, but they are said to be tied")
    config.tie_embeddings = are_equal if tied is None else tied
    if config.tie_embeddings:
        embedding = head
    return Checkpoint(config, {**tensors, EMBEDDING: embedding, HEAD: head}, str(path))


def see_layers(config: LlamaConfig, n_tensors: int, path: str | Path) -> None:
    """See that a file has tensors for all its layers, before anything is made for each of them.

    Raises:
        InputError: it has very many layers, and fewer tensors.
    """
    if config.n_layers > max(n_tensors, MANY_LAYERS):
        raise InputError(f"{path}: is to have {config.n_layers} layers, has {n_tensors} tensors")


def shortened(complaints: list[str]) -> str:
    """The first ten of many."""
    more = [f"and {len(complaints) - 10} more"] if len(complaints) > 10 else []
    return "; ".join(complaints[:10] + more)


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object.

    Raises:
        InputError: it is no such file.
    """
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def is_dense(value: object) -> bool:
    """Whether a checkpoint's value is an ordinary tensor of floating-point numbers."""
    return (
        isinstance(value, torch.Tensor)
        and value.dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
        and value.layout == torch.strided
        and not value.is_meta
    )


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are finite numbers in float32, which float64 goes beyond."""
    # Others make the sum so too, which is much quicker to compute. It may overflow without them.
    is_likely = tensor.sum(dtype=torch.float32).isfinite()
    return bool(is_likely or tensor.float().isfinite().all())
