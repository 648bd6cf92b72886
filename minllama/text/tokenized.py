"""Plain text as token ids on disk, mapped into memory.

A folder has for each split `SPLIT.bin`, the ids (each document after its BOS), and
`SPLIT.starts.bin`, the positions of the BOS. `index.json` has sizes and fingerprints; it is written
last.
"""

import hashlib
import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from minllama.common.errors import InputError
from minllama.common.files import atomic_write, file_fingerprint
from minllama.text.documents import SPLITS, Chunk, Corpus
from tokenizer import Tokenizer

INDEX = "index.json"
FILES = [f"{split}{suffix}" for split in SPLITS for suffix in (".bin", ".starts.bin")]
COUNTERS = ("n_bytes", "n_tokens", "n_unknown", "n_documents")  # of each split, in the index
START = np.dtype("<i8")  # type of a position in a file of starts


class Ids(Protocol):
    """A sequence of ids that can be sliced like an array, in one file or several."""

    def __len__(self) -> int: ...

    def __getitem__(self, where: slice) -> np.ndarray: ...


@dataclass(frozen=True)
class TokenizedText:
    """The ids of one split.

    Attributes:
        ids: `(n_tokens,)`, mapped into memory.
        starts: where the documents begin, `(n_documents,)`.
        n_bytes: length of the text in UTF-8.
        n_unknown: number of unknown characters among the ids.
        n_sampled: if only a sample of the ids was measured, its size without BOS. `n_bytes` and
            `n_unknown` are then of the sample.
    """

    ids: Ids
    starts: np.ndarray
    bos_id: int
    n_bytes: int
    n_unknown: int
    n_sampled: int | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens_per_byte(self) -> float:
        """Tokens per byte of text, without the BOS of the documents."""
        if self.n_sampled is not None:
            return self.n_sampled / self.n_bytes
        return (len(self) - len(self.starts)) / self.n_bytes

    def describe(self) -> str:
        """The size of the text in a line, and a second line if it has unknown characters."""
        if self.n_sampled is not None:
            size = f"{len(self):,} tokens, of {1 / self.tokens_per_byte:.2f} bytes on average"
            unknown = f"{self.n_unknown / self.n_sampled:.2%}"
        else:
            size = f"{self.n_bytes:,} bytes, {len(self):,} tokens"
            unknown = f"{self.n_unknown:,}"
        if self.n_unknown:
            size += f"\n  {unknown} of them <unk>, which bits per byte cannot account for"
        return size


def tokenize(corpus: Corpus, tokenizer: Tokenizer, folder: Path) -> dict[str, TokenizedText]:
    """Write the ids of each split to `folder`, unless an earlier run left them there intact.

    Returns:
        the splits that are not empty, by name.

    Raises:
        InputError: the texts are empty, or the folder has the ids of another tokenizer.
    """
    digest = hashlib.sha256(tokenizer.sp_model.serialized_model_proto()).hexdigest()
    index = _read_index(folder)
    if index is None:
        folder.mkdir(exist_ok=True)
        index = _write_ids(corpus, tokenizer, folder)
        index |= {"files": _fingerprints(folder), "tokenizer": digest}
        with atomic_write(folder / INDEX) as file:
            json.dump(index, file)
    elif index["tokenizer"] != digest:
        raise InputError(
            f"{tokenizer.model_path}: not the tokenizer that made {folder}; put it back, or name "
            "another --output_dir"
        )
    return {
        split: TokenizedText(
            np.memmap(folder / f"{split}.bin", id_dtype(tokenizer), mode="r"),
            np.memmap(folder / f"{split}.starts.bin", START, mode="r"),
            tokenizer.bos_id,
            index[split]["n_bytes"],
            index[split]["n_unknown"],
        )
        for split in SPLITS
        if index[split]["n_tokens"]
    }


def id_dtype(tokenizer: Tokenizer) -> np.dtype:
    """The type of ids in a file: little-endian, of two bytes if these hold every id, else four."""
    return np.dtype("<u2" if tokenizer.n_words <= 1 << 16 else "<u4")


def encode_chunk(tokenizer: Tokenizer, chunk: Chunk) -> list[int]:
    """The ids of a chunk, after BOS if a document begins there.

    The ids of a document's chunks, joined, are the document's. A later chunk is encoded after a
    line break, which is never part of a longer piece, so that it gets no space in front.
    """
    if chunk.begins:
        return tokenizer.encode(chunk.text, bos=True, eos=False)
    n_before = len(tokenizer.encode("\n", bos=False, eos=False))
    return tokenizer.encode(f"\n{chunk.text}", bos=False, eos=False)[n_before:]


def _write_ids(corpus: Corpus, tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """Tokenize the texts into the files of each split, and return the counters of each."""
    dtype = id_dtype(tokenizer)
    counts = {split: dict.fromkeys(COUNTERS, 0) for split in SPLITS}
    with ExitStack() as stack:
        files = {name: stack.enter_context(atomic_write(folder / name, "wb")) for name in FILES}
        bar = stack.enter_context(corpus.progress_bar("tokenize"))
        for split, chunk in corpus.split_chunks():
            ids, n_bytes = encode_chunk(tokenizer, chunk), len(chunk.text.encode())
            count = counts[split]
            if chunk.begins:
                files[f"{split}.starts.bin"].write(np.array(count["n_tokens"], START).tobytes())
            files[f"{split}.bin"].write(np.array(ids, dtype).tobytes())
            count["n_bytes"] += n_bytes
            count["n_tokens"] += len(ids)
            count["n_unknown"] += ids.count(tokenizer.sp_model.unk_id())
            count["n_documents"] += chunk.begins
            bar.update(n_bytes)
        for split, count in counts.items():
            if count["n_tokens"] == count["n_documents"] > 0:
                raise InputError(f"{corpus}: the {split} split has no tokens but BOS")
    return counts


def _fingerprints(folder: Path) -> dict[str, str]:
    return {name: file_fingerprint(folder / name) for name in FILES}


def _read_index(folder: Path) -> dict[str, Any] | None:
    """Read a folder's index. None if it is absent or damaged, or the files are not as it says."""
    try:
        index = json.loads((folder / INDEX).read_bytes())
        counts = [index[split][counter] for split in SPLITS for counter in COUNTERS]
        is_intact = min(counts) >= 0 and index["files"] == _fingerprints(folder)
        return index if is_intact and "tokenizer" in index else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
