"""Checks of a file that `torch.save` wrote, which `torch.load(weights_only=True)` does not make.

PyTorch ignores the checksums in its files, and a few bytes can describe tensors of any size.
"""

import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from minllama.common.errors import InputError
from minllama.common.progress import progress_bar

MAX_PICKLE = 4 * 2**20  # bytes; enough for a model of 1000 layers and its optimizer
MAX_VALUES, MAX_DEPTH = 1_000_000, 100
ZIP_MAGIC, ZIP_HEADER, ENCRYPTED = b"PK\x03\x04", 30, 1  # the header's bytes, and a flag in it


def check(path: str | Path) -> None:
    """Check, before PyTorch reads it, that a file is whole and its records are as they were saved.

    Raises:
        InputError: the file is damaged, or not one of `torch.save`.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            if is_zip(path):
                check_records(file)
            else:
                check_start(file.read(512).lstrip())
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:  # all of zipfile
        remedy = "copy or fetch it again (`bash setup.sh` does for stories42M.pt)"
        fault = f"damaged, incomplete or rewritten: {error}"
        raise InputError(f"{path}: {fault}; {remedy}") from error


def is_zip(path: str | Path) -> bool:
    """Whether PyTorch reads a file as a zip, which its first bytes decide."""
    with Path(path).open("rb") as file:
        return file.read(len(ZIP_MAGIC)) == ZIP_MAGIC


def check_start(start: bytes) -> None:
    """Check that a file that is no zip may be one of PyTorch before 1.6."""
    if not start or start.startswith(b"<"):
        raise zipfile.BadZipFile("a web page, not a checkpoint" if start else "an empty file")


def check_records(file: IO[bytes]) -> None:
    """Check the records of a file of PyTorch 1.6 or later."""
    if not zipfile.is_zipfile(file):
        raise zipfile.BadZipFile("its end is missing")
    archive = zipfile.ZipFile(file)
    records = archive.infolist()
    check_layout(records, archive.start_dir)
    pickles = [record for record in records if record.filename.endswith("/data.pkl")]
    if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE:
        raise zipfile.BadZipFile("it is a zip, but not one of torch.save")
    for record in progress_bar(records, desc="verify", unit=" records", delay=1):
        with archive.open(record) as content:
            while content.read(1 << 20):  # at the end zipfile compares the CRC-32
                pass


def check_layout(records: list[zipfile.ZipInfo], end: int) -> None:
    """Check that records are stored as they are, lie before `end`, and do not overlap."""
    if len({record.filename.casefold() for record in records}) < len(records):
        raise zipfile.BadZipFile("it has two records of the same name")
    for record in sorted(records, key=lambda record: record.header_offset, reverse=True):
        is_stored = record.compress_type == zipfile.ZIP_STORED and not record.flag_bits & ENCRYPTED
        if not is_stored or record.file_size != record.compress_size:
            raise zipfile.BadZipFile(f"its record {record.filename} is compressed; save it again")
        if not 0 <= record.header_offset <= end - ZIP_HEADER - record.file_size:
            raise zipfile.BadZipFile(
                f"its record {record.filename} overlaps another or lies outside"
            )
        end = record.header_offset


def check_values(value: Any, path: Path) -> None:
    """Check that a file has few values, and dense tensors of at most twice its size.

    A tensor may be an expanded view, which takes no memory before it is copied.

    Raises:
        InputError: it has others; nothing but the file's own size was allocated.
    """
    file_size = path.stat().st_size
    stack = [(value, 0)]
    n_values = n_bytes = 0  # a value counts again wherever it is referred to, as a tied head does
    while stack:
        item, depth = stack.pop()
        n_values += 1
        if isinstance(item, torch.Tensor):
            is_dense = item.layout == torch.strided and not item.is_nested
            if not is_dense or item.is_quantized or item.is_meta:
                raise InputError(f"{path}: refused, it has a sparse, quantized or empty tensor")
            n_bytes += item.nbytes
        elif isinstance(item, list | tuple | dict):
            items = item.values() if isinstance(item, dict) else item
            stack += [(each, depth + 1) for each in items]
        if n_values + len(stack) > MAX_VALUES or depth > MAX_DEPTH:
            raise InputError(
                f"{path}: refused, it has more values than any checkpoint, or nested too deeply"
            )
        if n_bytes > 2 * file_size:
            raise InputError(
                f"{path}: refused, its tensors take more than twice the {file_size:,} bytes of it"
            )
