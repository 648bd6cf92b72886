"""llama2.c's `.bin` files, as its programs read them: version 0 in float32, 2 in int8 (Q8_0).

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
from minllama.checkpoints.layout import EMBEDDING, HEAD, Checkpoint, build_checkpoint, shapes_of
from minllama.common.errors import InputError
from minllama.common.files import atomic_write
from minllama.common.progress import progress_bar

MAGIC = struct.pack("<I", 0x616B3432)  # "ak42", which version 2 begins with
HEADER_SIZES = {0: 28, 2: 256}  # bytes, by version
GROUP = 64  # numbers that share a scale, if it divides the widths
THETA = 10000.0
FIXED = {"rope_theta": THETA, "layer_norm_eps": 1e-5}  # in run.c and runq.c
SIZES = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
ATTENTION = tuple(f"attention.compute_{name}" for name in ("query", "key", "value", "output"))
FEED_FORWARD = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
ROTARY_TABLES = "rotary tables"  # cosines and sines in files of version 0; programs ignore them


class Header(NamedTuple):
    version: int
    config: LlamaConfig
    group: int  # numbers that share a scale in version 2


def recognizes(path: str | Path) -> bool:
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
    """The first 256 bytes of a file, with zeros after its end."""
    with path.open("rb") as file:
        return file.read(256).ljust(256, b"\0")


def parse_header(start: bytes) -> Header:
    """Read a header, or raise a `ValueError` if no Llama has these sizes."""
    if start.startswith(MAGIC):
        version, *sizes, tied, group = struct.unpack_from("<4xi7i?i", start)
        if version != 2:
            raise ValueError(f"version {version}, expected 0 or 2")
    else:
        sizes = list(struct.unpack_from("<7i", start))
        version, tied, group = 0, sizes[5] > 0, 1
    arguments = dict(zip(SIZES, sizes, strict=True)) | FIXED | {"vocab_size": abs(sizes[5])}
    config = LlamaConfig.from_model_args(arguments | {"causal": True, "tie_embeddings": tied})
    if version == 2 and (group < 1 or config.dim % group or config.ffn_dim % group):
        raise ValueError(f"groups of {group} do not divide {config.dim} and {config.ffn_dim}")
    return Header(version, config, group)


def tensors_of(header: Header) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors by name, in the order of the file."""
    config = header.config
    shapes = shapes_of(config)
    shapes[ROTARY_TABLES] = (2, config.max_seq_len, config.dim // config.n_heads // 2)

    def of_layers(*names: str) -> list[str]:
        return [f"layers.{i}.{name}.weight" for name in names for i in range(config.n_layers)]

    if header.version == 0:
        names = [EMBEDDING, *of_layers("attention_norm", *ATTENTION, "ffn_norm", *FEED_FORWARD)]
        names += ["norm.weight", ROTARY_TABLES]
    else:
        names = [*of_layers("attention_norm", "ffn_norm"), "norm.weight", EMBEDDING]
        names += of_layers(*ATTENTION, *FEED_FORWARD)
    if not config.tie_embeddings:
        names.append(HEAD)
    return {name: shapes[name] for name in names}


def tensor_size(header: Header, shape: tuple[int, ...]) -> int:
    """The bytes of a tensor; in version 2 matrices are int8, with a float32 scale per group."""
    n = math.prod(shape)
    return n + 4 * (n // header.group) if header.version == 2 and len(shape) == 2 else 4 * n


def file_size(header: Header) -> int:
    sizes = [tensor_size(header, shape) for shape in tensors_of(header).values()]
    return HEADER_SIZES[header.version] + sum(sizes)


def load(path: str | Path) -> Checkpoint:
    """Read a file, mapped into memory; int8 becomes float32. Raises an `InputError` if damaged."""
    path = Path(path)
    try:
        header = parse_header(read_start(path))
    except ValueError as error:
        raise InputError(f"{path}: not a file of llama2.c: {error}") from error
    size, expected = path.stat().st_size, file_size(header)
    if size != expected:
        raise InputError(f"{path}: has {size:,} bytes, but its header describes {expected:,}")
    content = np.memmap(path, np.uint8, mode="c")  # changes would stay in memory
    end = HEADER_SIZES[header.version]
    tensors = {}
    for name, shape in tensors_of(header).items():
        start, end = end, end + tensor_size(header, shape)
        part = content[start:end]
        if header.version == 2 and len(shape) == 2:
            n = math.prod(shape)
            steps = torch.from_numpy(part[:n].view(np.int8)).view(-1, header.group)
            scales = torch.from_numpy(part[n:].copy().view(np.float32))
            tensors[name] = (steps * scales[:, None]).view(shape)
        elif name != ROTARY_TABLES:
            tensors[name] = torch.from_numpy(part.view(np.float32)).view(shape)
    return build_checkpoint(header.config, tensors, path, header.config.tie_embeddings)


def save(checkpoint: Checkpoint, path: str | Path, version: int) -> None:
    """Write a causal model for `run.c` (version 0) or `runq.c` (version 2).

    Raises an `InputError` if those programs cannot run the model.
    """
    config, tensors, source = checkpoint
    for name, value in FIXED.items():
        if getattr(config, name) != value:
            raise InputError(f"{source}: llama2.c's programs fix {name} to {value}")
    group = math.gcd(GROUP, config.dim, config.ffn_dim)
    if version == 2 and group < 8:
        raise InputError(f"{source}: no groups divide its widths {config.dim} and {config.ffn_dim}")
    tied, n_kv_heads = config.tie_embeddings, config.n_kv_heads or config.n_heads
    vocab_size = -config.vocab_size if version == 0 and not tied else config.vocab_size
    sizes = (config.dim, config.ffn_dim, config.n_layers, config.n_heads, n_kv_heads, vocab_size)
    start = struct.pack("<7i", *sizes, config.max_seq_len)
    if version == 2:
        start = MAGIC + struct.pack("<i", version) + start + struct.pack("<?i", tied, group)
    shapes = tensors_of(Header(version, config, group))
    with atomic_write(path, "wb") as file:
        file.write(start.ljust(HEADER_SIZES[version], b"\0"))
        for name, shape in progress_bar(shapes.items(), desc="write", unit=" tensors"):
            if name == ROTARY_TABLES:
                file.write(rotary_tables(config))
            elif version == 2 and len(shape) == 2:
                file.write(quantize(tensors[name], group))
            else:
                file.write(tensors[name].float().contiguous().numpy().tobytes())


def in_order(checkpoint: Checkpoint, order: list[int]) -> Checkpoint:
    """The checkpoint with the ids of its vocabulary in another order."""
    if order == list(range(len(order))):
        return checkpoint
    moved = {name: checkpoint.tensors[name][order] for name in (EMBEDDING, HEAD)}
    return checkpoint._replace(tensors=checkpoint.tensors | moved)


def reorder_pieces(model: bytes, order: list[int]) -> bytes:
    """A SentencePiece model with its pieces in another order.

    It is a message of protocol buffers. Each piece is a field 1: the byte 10, a length, a content.
    """
    pieces: list[bytes] = []
    others: list[bytes] = []
    start = 0
    while start < len(model):
        length, position = 0, start + 1
        while True:  # seven bits in each byte, the lowest first
            length |= (model[position] & 127) << 7 * (position - start - 1)
            position += 1
            if model[position - 1] < 128:
                break
        fields = pieces if model[start] == 10 else others
        fields.append(model[start : position + length])
        start = position + length
    return b"".join([*(pieces[i] for i in order), *others])


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
