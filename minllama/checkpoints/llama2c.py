"""llama2.c's `.bin` files: versions 0 and 1 in float32, version 2 in int8 (Q8_0).

A file is a header and then the tensors one after the other. The programs that read it fix theta
and epsilon, so a model with others cannot be written.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from config import LlamaConfig
from minllama.checkpoints.layout import EMBEDDING, HEAD, Checkpoint, checked, shapes_of
from minllama.common.errors import InputError
from minllama.common.files import atomic_write
from minllama.common.progress import Bar

MAGIC = 0x616B3432  # "ak42"
HEADER = 256  # bytes of versions 1 and 2
GROUP = 64  # numbers that share a scale, if the widths can be divided by it
THETA, EPSILON = 10000.0, 1e-5  # of run.c and runq.c
ATTENTION_NORM, FFN_NORM, NORM = "attention_norm.weight", "ffn_norm.weight", "norm.weight"
QUERY_KEY_VALUE_OUTPUT = tuple(
    f"attention.compute_{name}.weight" for name in ("query", "key", "value", "output")
)
FEED_FORWARD = tuple(f"feed_forward.{name}.weight" for name in ("w1", "w2", "w3"))


class Header(NamedTuple):
    """Of a file: its version, the model, whether embedding and head are one, the group size."""

    version: int
    config: LlamaConfig
    tied: bool
    group: int | None


def reads(path: str | Path) -> bool:
    """Whether a file begins as these do; one of version 0 is known by its size."""
    path = Path(path)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(28)
    if len(start) < 28:
        return False
    if struct.unpack_from("<I", start)[0] == MAGIC:
        return True
    sizes = struct.unpack("<7i", start)
    try:
        config = config_of(sizes)
    except ValueError:
        return False
    return path.stat().st_size == size_of(Header(0, config, sizes[5] > 0, None))


def files_with_sums(path: str | Path) -> list[Path]:
    """None: these files carry no checksums."""
    return []


def config_of(sizes: tuple[int, ...]) -> LlamaConfig:
    """The configuration that the seven numbers of a header describe.

    Raises:
        ValueError: there is no such Llama.
    """
    dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len = sizes
    config = LlamaConfig(
        dim=dim,
        hidden_dim=hidden_dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        vocab_size=abs(vocab_size),
        max_seq_len=max_seq_len,
        layer_norm_eps=EPSILON,
        rope_theta=THETA,
        causal=True,
    )
    config.validate()
    return config


def order_of(header: Header) -> Iterator[str]:
    """The names of the tensors in the order of the file, `ROTARY_TABLES` among them."""
    layers = [f"layers.{i}." for i in range(header.config.n_layers)]

    def of_layers(*names: str) -> Iterator[str]:
        return (layer + name for name in names for layer in layers)

    if header.version == 0:
        yield EMBEDDING
        yield from of_layers(ATTENTION_NORM, *QUERY_KEY_VALUE_OUTPUT, FFN_NORM, *FEED_FORWARD)
        yield NORM
        yield ROTARY_TABLES
    else:
        yield from of_layers(ATTENTION_NORM, FFN_NORM)
        yield NORM
        yield EMBEDDING
        yield from of_layers(*QUERY_KEY_VALUE_OUTPUT, *FEED_FORWARD)
    if not header.tied:
        yield HEAD


ROTARY_TABLES = "rotary tables"  # cosines and sines in files of version 0, which nobody reads


def shape_in(header: Header, shapes: dict[str, tuple[int, ...]], name: str) -> tuple[int, ...]:
    """The shape of a tensor in a file."""
    if name == ROTARY_TABLES:
        config = header.config
        return (2, config.max_seq_len, config.dim // config.n_heads // 2)
    return shapes[name]


def bytes_of(header: Header, shape: tuple[int, ...]) -> int:
    """What a tensor takes; in version 2 matrices are int8 with a scale for each group."""
    n = int(np.prod([int(size) for size in shape], dtype=object))
    if header.version < 2 or len(shape) == 1:
        return 4 * n
    return n + 4 * (n // header.group)


def size_of(header: Header) -> int:
    """The size of the whole file, in bytes."""
    config = header.config
    names = list(order_of(header._replace(config=one_layer(config))))
    shapes = shapes_of(one_layer(config))
    total = 28 if header.version == 0 else HEADER
    for name in names:
        times = config.n_layers if name.startswith("layers.") else 1
        total += times * bytes_of(header, shape_in(header, shapes, name))
    return total


def one_layer(config: LlamaConfig) -> LlamaConfig:
    """The same with one layer, since a header may claim any number."""
    return LlamaConfig(**(vars(config) | {"n_layers": 1}))


def read_header(path: Path) -> Header:
    """What a file's beginning says, if it goes with the file's size.

    Raises:
        InputError: it does not, or there is no such model.
    """
    with path.open("rb") as file:
        start = file.read(HEADER)
    version, sizes, tied, group = 0, None, None, None
    if len(start) >= 28 and struct.unpack_from("<I", start)[0] == MAGIC:
        version = struct.unpack_from("<i", start, 4)[0]
        if version not in (1, 2) or len(start) < HEADER:
            raise InputError(f"{path}: version {version} of llama2.c's files, expected 0, 1 or 2")
        sizes = struct.unpack_from("<7i", start, 8)
        tied = start[36] != 0
        if version == 2:
            group = struct.unpack_from("<i", start, 37)[0]
    elif len(start) >= 28:
        sizes = struct.unpack_from("<7i", start)
        tied = sizes[5] > 0
    try:
        if sizes is None:
            raise ValueError("its header is incomplete")
        header = Header(version, config_of(sizes), tied, group)
        widths = (header.config.dim, header.config.ffn_dim)
        if group is not None and (group < 1 or any(width % group for width in widths)):
            raise ValueError(f"groups of {group} do not divide the widths {widths}")
    except ValueError as error:
        raise InputError(f"{path}: no file of llama2.c's: {error}") from error
    size, expected = path.stat().st_size, size_of(header)
    if size != expected:
        raise InputError(f"{path}: has {size:,} bytes, but its header describes {expected:,}")
    return header


def load(path: str | Path) -> Checkpoint:
    """Read a file, mapped into memory; int8 becomes float32.

    Raises:
        InputError: it is damaged, or no such file.
    """
    path = Path(path)
    header = read_header(path)
    shapes = shapes_of(header.config)
    content = np.memmap(path, np.uint8, mode="c")  # changes would stay in memory
    position = 28 if header.version == 0 else HEADER
    tensors = {}
    for name in order_of(header):
        shape = shape_in(header, shapes, name)
        n_bytes = bytes_of(header, shape)
        part = content[position : position + n_bytes]
        position += n_bytes
        if name == ROTARY_TABLES:
            continue
        if header.version < 2 or len(shape) == 1:
            tensors[name] = torch.from_numpy(part.view(np.float32).reshape(shape))
        else:
            n = shape[0] * shape[1]
            quantized = torch.from_numpy(part[:n].view(np.int8)).view(-1, header.group)
            scales = torch.from_numpy(np.frombuffer(part[n:].tobytes(), np.float32).copy())
            tensors[name] = (quantized * scales[:, None]).view(shape)
    return checked(header.config, tensors, path, header.tied)


def save(checkpoint: Checkpoint, path: str | Path, version: int) -> None:
    """Write a file for `run.c` (version 0) or `runq.c` (version 2).

    Args:
        checkpoint: of a causal model.

    Raises:
        InputError: the model is one that those programs do not run.
    """
    config, tensors, source = checkpoint
    for name, value, only in (
        ("rope_theta", config.rope_theta, THETA),
        ("layer_norm_eps", config.layer_norm_eps, EPSILON),
    ):
        if value != only:
            raise InputError(f"{source}: {name} is {value}, but llama2.c's programs fix {only}")
    group = group_for(config, source) if version == 2 else None
    header = Header(version, config, config.tie_embeddings, group)
    n_kv_heads = config.n_kv_heads or config.n_heads
    vocab_size = config.vocab_size
    if version == 0 and not header.tied:
        vocab_size = -vocab_size
    sizes = (config.dim, config.ffn_dim, config.n_layers, config.n_heads, n_kv_heads)
    sizes += (vocab_size, config.max_seq_len)
    with atomic_write(path, "wb") as file:
        if version == 0:
            file.write(struct.pack("<7i", *sizes))
        else:
            start = struct.pack("<Ii7iBi", MAGIC, version, *sizes, header.tied, group)
            file.write(start.ljust(HEADER, b"\0"))
        names = list(order_of(header))
        for name in Bar(names, desc="write", unit=" tensors"):
            if name == ROTARY_TABLES:
                file.write(rotary_tables(config))
            elif version == 2 and tensors[name].dim() == 2:
                file.write(quantized_bytes(tensors[name], group))
            else:
                file.write(tensors[name].float().contiguous().numpy().tobytes())


def group_for(config: LlamaConfig, source: str) -> int:
    """The group size for a model: 64, or the largest part of it that divides the widths."""
    group = GROUP
    while config.dim % group or config.ffn_dim % group:
        group //= 2
    if group < 8:
        raise InputError(f"{source}: its widths {config.dim} and {config.ffn_dim} have no groups")
    return group


def quantized_bytes(weight: torch.Tensor, group: int) -> bytes:
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
    return b"".join(
        table.astype(np.float32).tobytes() for table in (np.cos(angles), np.sin(angles))
    )
