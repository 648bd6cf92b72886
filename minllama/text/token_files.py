"""Token ids in files that are mapped, not read: a run's own, and those of llama2.c and nanoGPT."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from minllama.common.errors import InputError
from minllama.text.documents import SPLITS
from tokenizer import Tokenizer

SUFFIX = ".bin"
N_BLOCKS, BLOCK = 256, 4096  # a sample has this many blocks of this many ids


@dataclass(frozen=True)
class TokenizedText:
    """The ids of one split.

    Attributes:
        n_bytes, n_unknown: bytes of the text in UTF-8, and unknown characters.
        n_sampled: number of ids without BOS, if these two are of a sample only.
    """

    files: Sequence[np.ndarray]  # the ids in the order of the text, each (n_tokens,)
    starts: np.ndarray  # where the documents begin, (n_documents,)
    tokenizer: Tokenizer
    n_bytes: int = 0
    n_unknown: int = 0
    n_sampled: int | None = None

    def __len__(self) -> int:
        return sum(map(len, self.files))

    def __getitem__(self, where: slice) -> np.ndarray:
        """Read some ids, and raise InputError if one is not in the vocabulary."""
        start, stop, _ = where.indices(len(self))
        parts = slice_files(self.files, start, stop)
        for part in parts:
            if (part >= self.tokenizer.n_words).any():
                raise InputError(
                    f"{getattr(part, 'filename', '')}: id {part.max()}, but the tokenizer has "
                    f"{self.tokenizer.n_words} pieces; name its own with --tokenizer-path"
                )
        return np.concatenate(parts)

    @property
    def tokens_per_byte(self) -> float:
        """Tokens per byte of text, without the BOS of the documents."""
        return (self.n_sampled or len(self) - len(self.starts)) / self.n_bytes

    def describe(self) -> str:
        """The size of the text in a line, and a second line if it has unknown characters."""
        size, unknown = f"{self.n_bytes:,} bytes, {len(self):,} tokens", f"{self.n_unknown:,}"
        if self.n_sampled:
            size = f"{len(self):,} tokens, of {1 / self.tokens_per_byte:.2f} bytes on average"
            unknown = f"{self.n_unknown / self.n_sampled:.2%}"
        if self.n_unknown:
            size += f"\n  {unknown} of them <unk>, which bits per byte cannot account for"
        return size


def slice_files(files: Sequence[np.ndarray], start: int, stop: int) -> list[np.ndarray]:
    """The parts of arrays, as if joined, from `start` to before `stop`; at least one."""
    parts = []
    for file in files:
        if start <= len(file) and stop >= 0:
            parts.append(file[max(0, start) : stop])
        start, stop = start - len(file), stop - len(file)
    return parts


def id_dtype(tokenizer: Tokenizer) -> np.dtype:
    """The type of ids in a file: little-endian, of two bytes if these hold every id, else four."""
    return np.dtype("<u2" if tokenizer.n_words <= 1 << 16 else "<u4")


def holds_token_ids(paths: Sequence[str]) -> bool:
    """Whether the files hold token ids rather than text."""
    return any(Path(path).suffix == SUFFIX for path in paths)


def check_token_files(paths: Sequence[str], tokenizer_path: str | None) -> None:
    """Check that files of token ids stand alone and come with their tokenizer."""
    is_mixed = any(Path(path).suffix != SUFFIX for path in paths)
    if holds_token_ids(paths) and (is_mixed or tokenizer_path is None):
        raise InputError(
            f"--text: files of token ids ({SUFFIX}) need the tokenizer that made them, with "
            "--tokenizer-path, and no texts among them"
        )


def open_token_files(
    paths: Sequence[str], shares: Sequence[float], tokenizer: Tokenizer
) -> dict[str, TokenizedText]:
    """Split files of ids, in their order, without scanning them: each split is one document.

    Args:
        shares: the fractions of the ids for training, validation and test.

    Returns:
        the splits that have a share, by name.

    Raises:
        InputError: a file holds no ids, or a split would be empty or stand for no text.
    """
    files, dtype = [], id_dtype(tokenizer)
    for path in paths:
        try:
            files.append(np.memmap(path, dtype, mode="r"))
        except ValueError as error:
            raise InputError(f"{path}: no ids of {dtype.itemsize} bytes each: {error}") from error
    n_tokens = sum(map(len, files))
    cuts = [0, *np.round(np.cumsum(shares) / sum(shares) * n_tokens).astype(np.int64).tolist()]
    splits = {}
    for i, name in enumerate(SPLITS):
        if not shares[i]:
            continue
        ids = slice_files(files, cuts[i], cuts[i + 1])
        splits[name] = measure(TokenizedText(ids, np.zeros(1, np.int64), tokenizer))
        if splits[name].n_bytes == 0:
            raise InputError(
                f"{', '.join(paths)}: {n_tokens} ids leave no text for {name}; give more files, "
                "another --split, or the tokenizer that made them"
            )
    return splits


def measure(text: TokenizedText) -> TokenizedText:
    """Count the bytes of text in a sample of the ids. Each unknown character counts as one byte.

    The sample is all ids, or of more than `N_BLOCKS * BLOCK` this many, in evenly spaced blocks. It
    leaves out the first id, which is not predicted.
    """
    tokenizer, model = text.tokenizer, text.tokenizer.sp_model
    starts, size = [0], len(text) - 1
    if size > N_BLOCKS * BLOCK:
        starts = np.linspace(0, size - BLOCK, N_BLOCKS).astype(np.int64).tolist()
        size = BLOCK
    n_sampled = n_bytes = n_unknown = 0
    for start in starts:
        ids = text[start : start + size + 1]
        n_sampled += int(np.count_nonzero(ids[1:] != tokenizer.bos_id))
        n_unknown += int(np.count_nonzero(ids[1:] == model.unk_id()))
        # Decoding drops the space that the tokenizer adds in front of a text.
        ends = np.flatnonzero(np.isin(ids, (tokenizer.bos_id, tokenizer.eos_id)))
        decoded = model.decode([part.tolist() for part in np.split(ids, ends)])
        n_bytes += sum(len(part.encode()) for part in decoded)
        n_bytes -= len(model.decode(ids[:1].tolist()).encode())  # not a target of this block
    n_bytes -= n_unknown * (len(model.decode([model.unk_id()]).encode()) - 1)
    return replace(text, n_bytes=n_bytes, n_unknown=n_unknown, n_sampled=n_sampled)
