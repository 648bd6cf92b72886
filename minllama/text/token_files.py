"""Files of token ids for pre-training, as llama2.c and nanoGPT write them: mapped, not read."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from minllama.common.errors import InputError
from minllama.text.plain import PARTS, TokenizedText, id_dtype
from tokenizer import Tokenizer

SUFFIX = ".bin"
N_BLOCKS, BLOCK = 256, 4096  # a sample is so many blocks of so many ids


def open_token_files(
    paths: Sequence[str | Path], shares: Sequence[float], tokenizer: Tokenizer
) -> dict[str, TokenizedText]:
    """The parts of token files, cut by position: nothing is scanned for where documents begin.

    The files are read as one sequence, in the order given. The first of `shares` (by ids) is for
    training, the next for validation, the last for testing. Each part counts as one document.

    Returns:
        the parts that have a share, by name.

    Raises:
        InputError: a file holds no ids, or a part would be empty or stand for no text.
    """
    files = [map_file(path, tokenizer) for path in paths]
    n_tokens = sum(map(len, files))
    cuts = [0, *np.round(np.cumsum(shares) / sum(shares) * n_tokens).astype(np.int64).tolist()]
    measure = Measure(tokenizer)
    parts = {}
    for i, name in enumerate(PARTS):
        if not shares[i]:
            continue
        ids = TokenFiles(paths, files, tokenizer.n_words, cuts[i], cuts[i + 1])
        n_sampled, n_bytes, n_unknown = measure(ids)
        if n_bytes == 0:
            raise InputError(
                f"{', '.join(map(str, paths))}: {n_tokens} ids leave no text for {name}; give more "
                "files, another --split, or the tokenizer that made them"
            )
        starts = np.zeros(1, np.int64)
        parts[name] = TokenizedText(ids, starts, tokenizer.bos_id, n_bytes, n_unknown, n_sampled)
    return parts


def map_file(path: str | Path, tokenizer: Tokenizer) -> np.memmap:
    """The ids of a file, `(n_tokens,)`: little-endian, of two or four bytes as the tokenizer needs.

    Raises:
        InputError: it is empty, or ends within an id.
    """
    size, dtype = Path(path).stat().st_size, id_dtype(tokenizer)
    if size == 0:
        raise InputError(f"{path}: an empty file; leave it out")
    if size % dtype.itemsize:
        raise InputError(
            f"{path}: its {size} bytes are no whole number of ids, which take {dtype.itemsize} "
            f"bytes each for a tokenizer of {tokenizer.n_words} pieces; name a file of such ids"
        )
    return np.memmap(path, dtype, mode="r")


class TokenFiles:
    """The ids of files, one file after the other, from `first` up to, but without, `last`.

    Only what a slice needs is read, and is then compared with the vocabulary.

    Args:
        paths: the files' names, for errors.
        files: the ids of each file, `(n_tokens,)`, mapped into memory.
        n_words: the tokenizer's number of pieces.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        files: Sequence[np.ndarray],
        n_words: int,
        first: int,
        last: int,
    ):
        self.paths, self.files, self.n_words = paths, files, n_words
        self.first, self.last = first, last
        self.ends = np.cumsum([len(file) for file in files], dtype=np.int64)

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, where: slice) -> np.ndarray:
        """
        Raises:
            InputError: an id is no piece of the tokenizer.
        """
        start, stop, _ = where.indices(len(self))
        start, stop = self.first + start, self.first + stop
        slices = []
        i = int(self.ends.searchsorted(start, side="right"))
        while start < stop:
            before = int(self.ends[i]) - len(self.files[i])
            ids = self.files[i][start - before : stop - before]
            if ids.max() >= self.n_words:
                place = int(np.argmax(ids >= self.n_words))
                raise InputError(
                    f"{self.paths[i]}: id {ids[place]} at position {start - before + place} (from "
                    f"0), but the tokenizer has {self.n_words} pieces; name the one that made the "
                    "ids with --tokenizer-path"
                )
            slices.append(ids)
            start += len(ids)
            i += 1
        return slices[0] if len(slices) == 1 else np.concatenate(slices or [self.files[0][:0]])


class Measure:
    """Measures the text that ids stand for, without decoding them.

    A piece has as many bytes as its text, a byte's piece one, BOS and EOS none. The space that a
    tokenizer puts in front of a text counts nothing. Unknown characters count a byte.
    """

    def __init__(self, tokenizer: Tokenizer):
        pieces = tokenizer.sp_model
        self.bos_id, self.unk_id = tokenizer.bos_id, pieces.unk_id()
        self.ends_text = [tokenizer.bos_id, tokenizer.eos_id]
        self.n_bytes = np.zeros(tokenizer.n_words, np.int64)
        self.has_space = np.zeros(tokenizer.n_words, bool)  # in front
        adds_space = pieces.encode_as_pieces("a")[0].startswith("▁")
        for i in range(tokenizer.n_words):
            piece = pieces.id_to_piece(i)
            if pieces.is_byte(i) or pieces.is_unknown(i):
                self.n_bytes[i] = 1
            elif not pieces.is_control(i):
                self.n_bytes[i] = len(piece.replace("▁", " ").encode())
                self.has_space[i] = adds_space and piece.startswith("▁")

    def __call__(self, ids: TokenFiles) -> tuple[int, int, int]:
        """Of all ids but the first, which nothing predicts; where there are more than 2**20, of as
        many in evenly spaced blocks.

        Returns:
            how many there are without BOS, their bytes, and how many are unknown characters.
        """
        n_targets = max(0, len(ids) - 1)
        starts, size = [0], n_targets
        if n_targets > N_BLOCKS * BLOCK:
            starts = np.linspace(0, n_targets - BLOCK, N_BLOCKS).astype(np.int64).tolist()
            size = BLOCK
        n_tokens = n_bytes = n_unknown = 0
        for start in starts:
            block = ids[start : start + size + 1]
            before, targets = block[:-1], block[1:]
            added_spaces = self.has_space[targets] & np.isin(before, self.ends_text)
            n_bytes += int(self.n_bytes[targets].sum() - added_spaces.sum())
            n_tokens += int((targets != self.bos_id).sum())
            n_unknown += int((targets == self.unk_id).sum())
        return n_tokens, n_bytes, n_unknown
