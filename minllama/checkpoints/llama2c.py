"""llama2.c's `.bin` files: versions 0 and 1 in float32, version 2 in int8 (Q8_0).

A file is a header followed by the tensors. The programs that read it fix theta and epsilon, so a
model with other values cannot be written.
"""

import math
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from config import LlamaConfig
from minllama.checkpoints.layout import EMBEDDING, HEAD, Checkpoint, checked, shapes_of
from minllama.common.errors import InputError
from minllama.common.files import atomic_write
from minllama.common.progress import Bar

MAGIC = struct.pack("<I", 0x616B3432)  # "ak42", which versions 1 and 2 begin with
HEADER_SIZES = (28, 256, 256)  # bytes, by version
GROUP = 64  # numbers that share a scale, if it divides the widths
THETA, EPSILON = 10000.0, 1e-5  # of run.c and runq.c
SIZES = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
ATTENTION_NORM, FFN_NORM, NORM = "attention_norm.weight", "ffn_norm.weight", "norm.weight"
MATRICES = tuple(
    f"{name}.weight"
    for name in (
        *("attention.compute_query", "attention.compute_key", "attention.compute_value"),
        *("attention.compute_output", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    )
)
ROTARY_TABLES = "rotary tables"  # cosines and sines in files of version 0; programs ignore them


class Header(NamedTuple):
    """The header of a file; `group` is the group size of version 2."""

    version: int
    config: LlamaConfig
    tied: bool
    group: int = 1


def reads(path: str | Path) -> bool:
    """Whether a file begins with the magic number; one of version 0 is recognized by its size."""
    path = Path(path)
    if not path.is_file():
        return False
    start = read_start(path)
    try:
        return start.startswith(MAGIC) or path.stat().st_size == file_size(parse_header(start))
    except ValueError:
        return False


def read_start(path: Path) -> bytes:
    """The first 256 bytes of a file."""
    with path.open("rb") as file:
        return file.read(max(HEADER_SIZES))


def parse_header(start: bytes) -> Header:
    """Read a header from the beginning of a file.

    Raises:
        ValueError: it is incomplete, or no Llama has these sizes.
    """
    try:
        if start.startswith(MAGIC):
            version, *sizes, tied, group = struct.unpack_from("<4xi7i?i", start)
            if version not in (1, 2):
                raise ValueError(f"version {version}, expected 0, 1 or 2")
        else:
            sizes = list(struct.unpack_from("<7i", start))
            version, tied, group = 0, sizes[5] > 0, 1
    except struct.error as error:
        raise ValueError("its header is incomplete") from error
    arguments = dict(zip(SIZES, sizes, strict=True)) | {"vocab_size": abs(sizes[5])}
    arguments |= {"layer_norm_eps": EPSILON, "rope_theta": THETA, "causal": True}
    config = LlamaConfig.from_model_args(arguments)
    if version == 2 and (group < 1 or config.dim % group or config.ffn_dim % group):
        raise ValueError(f"groups of {group} do not divide {config.dim} and {config.ffn_dim}")
    return Header(version, config, tied, group)


def tensors_of(header: Header) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors by name, in the order of the file."""
    config = header.config
    shapes = shapes_of(config)
    shapes[ROTARY_TABLES] = (2, config.max_seq_len, config.dim // config.n_heads // 2)

    def of_layers(*names: str) -> list[str]:
        return [f"layers.{i}.{name}" for name in names for i in range(config.n_layers)]

    if header.version == 0:
        names = [EMBEDDING, *of_layers(ATTENTION_NORM, *MATRICES[:4], FFN_NORM, *MATRICES[4:])]
        names += [NORM, ROTARY_TABLES]
    else:
        names = [*of_layers(ATTENTION_NORM, FFN_NORM), NORM, EMBEDDING, *of_layers(*MATRICES)]
    if not header.tied:
        names.append(HEAD)
    return {name: shapes[name] for name in names}


def tensor_size(header: Header, shape: tuple[int, ...]) -> int:
    """The bytes of a tensor; in version 2 matrices are int8, with a float32 scale per group."""
    n = math.prod(shape)
    return n + 4 * (n // header.group) if header.version == 2 and len(shape) == 2 else 4 * n


def file_size(header: Header) -> int:
    """The bytes of the whole file."""
    sizes = [tensor_size(header, shape) for shape in tensors_of(header).values()]
    return HEADER_SIZES[header.version] + sum(sizes)


def load(path: str | Path) -> Checkpoint:
    """Read a file, mapped into memory; int8 becomes float32.

    Raises:
        InputError: it is damaged, or not such a file.
    """
    path = Path(path)
    try:
        header = parse_header(read_start(path))
    except ValueError as error:
        raise InputError(f"{path}: not a file of llama2.c: {error}") from error
    size, expected = path.stat().st_size, file_size(header)
    if size != expected:
        raise InputError(f"{path}: has {size:,} bytes, but its header describes {expected:,}")
    content = np.memmap(path, np.uint8, mode="c")  # changes would stay in memory
    position = HEADER_SIZES[header.version]
    tensors = {}
    for name, shape in tensors_of(header).items():
        n_bytes = tensor_size(header, shape)
        part = content[position : position + n_bytes]
        position += n_bytes
        if header.version == 2 and len(shape) == 2:
            n = math.prod(shape)
            quantized = torch.from_numpy(part[:n].view(np.int8)).view(-1, header.group)
            scales = torch.from_numpy(np.frombuffer(part[n:].tobytes(), np.float32).copy())
            tensors[name] = (quantized * scales[:, None]).view(shape)
        elif name != ROTARY_TABLES:
            tensors[name] = torch.from_numpy(part.view(np.float32).reshape(shape))
    return checked(header.config, tensors, path, header.tied)


def save(checkpoint: Checkpoint, path: str | Path, version: int) -> None:
    """Write a file for `run.c` (version 0) or `runq.c` (version 2).

    Args:
        checkpoint: of a causal model.

    Raises:
        InputError: those programs cannot run the model.
    """
    config, tensors, source = checkpoint
    for name, fixed in (("rope_theta", THETA), ("layer_norm_eps", EPSILON)):
        value = getattr(config, name)
        if value != fixed:
            raise InputError(f"{source}: {name} is {value}, but llama2.c's programs fix {fixed}")
    group = group_size(config, source) if version == 2 else 1
    header = Header(version, config, config.tie_embeddings, group)
    n_kv_heads = config.n_kv_heads or config.n_heads
    vocab_size = -config.vocab_size if version == 0 and not header.tied else config.vocab_size
    sizes = (config.dim, config.ffn_dim, config.n_layers, config.n_heads, n_kv_heads, vocab_size)
    start = struct.pack("<7i", *sizes, config.max_seq_len)
    if version == 2:
        start = MAGIC + struct.pack("<i", version) + start + struct.pack("<?i", header.tied, group)
    with atomic_write(path, "wb") as file:
        file.write(start.ljust(HEADER_SIZES[version], b"\0"))
        for name, shape in Bar(tensors_of(header).items(), desc="write", unit=" tensors"):
            if name == ROTARY_TABLES:
                file.write(rotary_tables(config))
            elif version == 2 and len(shape) == 2:
                file.write(quantize(tensors[name], group))
            else:
                file.write(tensors[name].float().contiguous().numpy().tobytes())


def group_size(config: LlamaConfig, source: str) -> int:
    """The group size for a model: 64, or its largest power of two that divides the widths."""
    group = GROUP
    while config.dim % group or config.ffn_dim % group:
        group //= 2
    if group < 8:
        raise InputError(f"{source}: no groups divide its widths {config.dim} and {config.ffn_dim}")
    return group


def quantize(weight: torch.Tensor, group: int) -> bytes:
    """Q8_0: groups of int8, then a float32 scale for each; 127 steps of the largest magnitude."""
    groups = weight.float().reshape(-1, group)
    scales = groups.abs().amax(dim=1) / 127
    steps = groups / scales.clamp_min(1e-30)[:, None]
    return steps.round().to(torch.int8).numpy().tobytes() + scales.numpy().tobytes()


def rotary_tables(config: LlamaConfig) -> bytes:
    """Cosines and sines of all positions and pairs, in float32."""
    head_dim = config.dim // config.n_heads
    frequencies = THETA ** -(np.arange(0, head_dim, 2) / head_dim)
    angles = np.outer(np.arange(config.max_seq_len), frequencies)
    return np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32).tobytes()
