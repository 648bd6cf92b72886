"""Plain text for pre-training: documents, read in chunks and split for training and evaluation."""

import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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


class TextSize(NamedTuple):
    """The size of all texts of a corpus, in UTF-8."""

    n_documents: int
    n_bytes: int


@dataclass(frozen=True)
class Corpus:
    """Text files, split for training and evaluation.

    Attributes:
        shares: of training, validation and testing, by bytes, in the order of the texts. Documents
            stay whole, unless there is only one.
    """

    paths: Sequence[str | Path]
    shares: Sequence[float]

    def __str__(self) -> str:
        return ", ".join(map(str, self.paths))

    @functools.cached_property
    def size(self) -> TextSize:
        """The number of documents and bytes, for which all texts are read.

        Raises:
            InputError: the texts are empty.
        """
        n_documents = n_bytes = 0
        with self.progress_bar("read") as bar:
            for path in self.paths:
                for text, begins in read_chunks(path):
                    size = len(text.encode())
                    n_documents += begins
                    n_bytes += size
                    bar.update(size)
        if n_bytes == 0:
            raise InputError(f"{self}: no text in it; name a file that has some")
        return TextSize(n_documents, n_bytes)

    def split_chunks(self) -> Iterator[tuple[str, Chunk]]:
        """Read all texts in chunks, each with the name of its split.

        A single document begins anew in each split.

        Raises:
            InputError: a split would be empty.
        """
        n_documents, n_bytes = self.size
        is_single = n_documents == 1
        chunk_size = max(1, min(BLOCK, n_bytes // 1000)) if is_single else BLOCK
        ends = np.cumsum(self.shares) / sum(self.shares) * n_bytes
        position, split, used = 0, "", set()
        for path in self.paths:
            for text, begins in read_chunks(path, chunk_size):
                if begins or is_single:
                    previous = split
                    split = SPLITS[min(2, int(np.searchsorted(ends, position, side="right")))]
                    begins = begins or split != previous
                    used.add(split)
                position += len(text.encode())
                yield split, Chunk(text, begins)
        wanted = [split for split, share in zip(SPLITS, self.shares, strict=True) if share]
        empty = [split for split in wanted if split not in used]
        if empty:
            raise InputError(
                f"{self}: {n_documents} documents of {n_bytes} bytes leave nothing for "
                f"{' and '.join(empty)}; give more text or another --split"
            )

    def training_texts(self) -> Iterator[str]:
        """The chunks of the training split."""
        return (chunk.text for split, chunk in self.split_chunks() if split == "train")

    def progress_bar(self, description: str) -> Bar:
        """A progress bar over the bytes of the texts."""
        total = sum(Path(path).stat().st_size for path in self.paths if Path(path).is_file())
        return Bar(desc=description, total=total, unit="B", unit_scale=True)
