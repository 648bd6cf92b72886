"""Plain text for pre-training: documents, read in chunks and split for training and evaluation."""

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minllama.common.errors import InputError, missing_file
from minllama.common.progress import Bar
from minllama.text.labelled import read_labelled

SPLITS = ("train", "validation", "test")
DOCUMENT_SEPARATOR = "<|endoftext|>"
LABELLED_LINE = re.compile(r"-?\d+ \|\|\| ")
BOUNDARY = re.compile(r"(?<=\S) (?=\S)|\n")  # a document may be cut in two before these
BLOCK = 1 << 20  # characters that are read at a time


class Chunk(NamedTuple):
    """A document, or a piece of one."""

    text: str
    begins: bool  # whether it is the first piece


class TextSize(NamedTuple):
    """The size of all texts, in UTF-8."""

    n_documents: int
    n_bytes: int


def read_chunks(path: str | Path, size: int = BLOCK) -> Iterator[Chunk]:
    """Read the documents of a text in chunks of at least `size` characters.

    Lines `<|endoftext|>` separate documents; a file without them is one document. In a file of
    `label ||| sentence` lines, which is read whole, each sentence is a document. White space around
    a document is dropped. The chunks of a document, joined, are the document.

    Raises:
        FileNotFoundError: the file does not exist.
        InputError: it is not UTF-8.
    """
    if not Path(path).is_file():
        raise missing_file(path)
    try:
        with Path(path).open(encoding="utf-8-sig") as file:
            if LABELLED_LINE.match(file.readline(BLOCK)):
                sentences = (sentence for _, sentence in read_labelled(path))
                yield from (Chunk(sentence, True) for sentence in sentences if sentence)
            else:
                file.seek(0)
                yield from _chunks(iter(lambda: file.readline(size), ""), size)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text; save it as UTF-8") from error


def _chunks(lines: Iterator[str], size: int) -> Iterator[Chunk]:
    """Split lines into documents, and documents into chunks."""
    pieces: list[str] = []
    length, begins = 0, True
    for line in itertools.chain(lines, [DOCUMENT_SEPARATOR]):
        if line.strip() == DOCUMENT_SEPARATOR:
            text = "".join(pieces).rstrip()
            if text:
                yield Chunk(text, begins)
            pieces, length, begins = [], 0, True
            continue
        if begins and not pieces:
            line = line.lstrip()
        boundary = BOUNDARY.search(line) if length >= size else None
        if boundary or length >= size + BLOCK:
            end = boundary.start() if boundary else 0
            yield Chunk("".join([*pieces, line[:end]]), begins)
            pieces, length, begins = [], 0, False
            line = line[end:]
        if line:
            pieces.append(line)
            length += len(line)


def measure(paths: Sequence[str | Path]) -> TextSize:
    """Count the documents and bytes of all texts.

    Raises:
        InputError: the texts are empty.
    """
    n_documents = n_bytes = 0
    with progress_bar("read", paths) as bar:
        for path in paths:
            for chunk in read_chunks(path):
                n = len(chunk.text.encode())
                n_documents += chunk.begins
                n_bytes += n
                bar.update(n)
    if n_bytes == 0:
        names = ", ".join(map(str, paths))
        raise InputError(f"{names}: no text in it; name a file that has some")
    return TextSize(n_documents, n_bytes)


def split_chunks(
    paths: Sequence[str | Path], shares: Sequence[float], size: TextSize
) -> Iterator[tuple[str, Chunk]]:
    """Read all texts in chunks, and assign each to one of `SPLITS`.

    The first of `shares` (by bytes, in the order of the texts) is for training, the next for
    validation, the last for testing. Documents stay whole, unless there is only one.

    Args:
        size: what `measure(paths)` returned.

    Yields:
        the split and the chunk; a single document begins anew in each split.

    Raises:
        InputError: a split would be empty.
    """
    is_single = size.n_documents == 1
    chunk_size = max(1, min(BLOCK, size.n_bytes // 1000)) if is_single else BLOCK
    ends = np.cumsum(shares) / sum(shares) * size.n_bytes
    position, split, used = 0, "", set()
    for text, begins in itertools.chain.from_iterable(read_chunks(p, chunk_size) for p in paths):
        if begins or is_single:
            before = split
            split = SPLITS[min(2, int(np.searchsorted(ends, position, side="right")))]
            begins = begins or split != before
            used.add(split)
        position += len(text.encode())
        yield split, Chunk(text, begins)
    empty = [name for name, share in zip(SPLITS, shares, strict=True) if share and name not in used]
    if empty:
        raise InputError(
            f"{', '.join(map(str, paths))}: {size.n_documents} documents of {size.n_bytes} bytes "
            f"leave nothing for {' and '.join(empty)}; give more text or another --split"
        )


def progress_bar(description: str, paths: Sequence[str | Path]) -> Bar:
    """A progress bar over the bytes of the texts."""
    total = sum(Path(path).stat().st_size for path in paths if Path(path).is_file())
    return Bar(desc=description, total=total, unit="B", unit_scale=True)
