"""Plain text for pre-training: documents, read in chunks and split for training and evaluation."""

import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from minllama.common.errors import InputError, missing_file
from minllama.common.progress import progress_bar
from minllama.text.labelled import read_labelled

SPLITS = ("train", "validation", "test")
DOCUMENT_SEPARATOR = "<|endoftext|>"
LABELLED_LINE = re.compile(r"-?\d+ \|\|\| ")
BOUNDARY = re.compile(r"(?<=\S) (?=\S)|\n")  # a document may be cut in two before these
BLOCK = 1 << 20  # characters that are read at a time


class Chunk(NamedTuple):
    """A document, or a piece of one; `begins` is true of the first piece."""

    text: str
    begins: bool


def read_chunks(path: str | Path, size: int = BLOCK) -> Iterator[Chunk]:
    """Read the documents of a text in chunks of at least `size` characters.

    Lines `<|endoftext|>` separate documents; white space around a document is dropped. In a file of
    `label ||| sentence` lines, which is read whole, each sentence is a document.

    Raises:
        FileNotFoundError, InputError: the file does not exist; it is not UTF-8.
    """
    if not Path(path).is_file():
        raise missing_file(path)
    try:
        with Path(path).open(encoding="utf-8-sig") as file:
            if LABELLED_LINE.match(file.readline(BLOCK)):
                yield from (Chunk(text, True) for text, *_ in read_labelled(path) if text)
            else:
                file.seek(0)
                yield from _chunks(iter(lambda: file.readline(size), ""), size)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text; save it as UTF-8") from error


def _chunks(lines: Iterator[str], size: int) -> Iterator[Chunk]:
    """Split lines into documents, and documents into chunks."""
    text, begins = "", True
    for line in itertools.chain(lines, [DOCUMENT_SEPARATOR]):
        if line.strip() == DOCUMENT_SEPARATOR:
            if text := text.rstrip():
                yield Chunk(text, begins)
            text, begins = "", True
            continue
        if begins and not text:
            line = line.lstrip()
        boundary = BOUNDARY.search(line) if len(text) >= size else None
        if boundary or len(text) >= size + BLOCK:
            end = boundary.start() if boundary else 0
            yield Chunk(text + line[:end], begins)
            text, begins, line = "", False, line[end:]
        text += line


@dataclass(frozen=True)
class Corpus:
    """Text files, split in their order. Only a single document is cut; several stay whole."""

    paths: Sequence[str | Path]
    shares: Sequence[float]  # of training, validation and test, in bytes

    def __str__(self) -> str:
        return ", ".join(map(str, self.paths))

    @functools.cached_property
    def size(self) -> tuple[int, int]:
        """The number of documents and of bytes in UTF-8, for which all texts are read."""
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
        return n_documents, n_bytes

    def split_chunks(self) -> Iterator[tuple[str, Chunk]]:
        """Read all texts in chunks, each with its split. A single document restarts in each."""
        n_documents, n_bytes = self.size
        is_single = n_documents == 1
        chunk_size = max(1, min(BLOCK, n_bytes // 1000)) if is_single else BLOCK
        ends = np.cumsum(self.shares) / sum(self.shares) * n_bytes
        position, split = 0, ""
        for path in self.paths:
            for text, begins in read_chunks(path, chunk_size):
                if begins or is_single:
                    previous = split
                    split = SPLITS[min(2, int(np.searchsorted(ends, position, side="right")))]
                    begins = begins or split != previous
                position += len(text.encode())
                yield split, Chunk(text, begins)

    def training_texts(self) -> Iterator[str]:
        """The chunks of the training split."""
        return (chunk.text for split, chunk in self.split_chunks() if split == "train")

    def progress_bar(self, description: str) -> tqdm:
        """A progress bar over the bytes of the texts."""
        total = sum(Path(path).stat().st_size for path in self.paths if Path(path).is_file())
        return progress_bar(desc=description, total=total, unit="B", unit_scale=True)
