"""Files of token ids for pre-training, as llama2.c and nanoGPT write them: mapped, not read."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from minllama.common.errors import InputError
from minllama.text.documents import SPLITS
from minllama.text.tokenized import TokenizedText, id_dtype
from tokenizer import Tokenizer

SUFFIX = ".bin"
N_BLOCKS, BLOCK = 256, 4096  # a sample has this many blocks of this many ids


def open_token_files(
    paths: Sequence[str | Path], shares: Sequence[float], tokenizer: Tokenizer
) -> dict[str, TokenizedText]:
    """Split token files by position, without scanning them for documents.

    The files are one sequence, in the order given. The first of `shares` (by ids) is for training,
    the next for validation, the last for testing. Each split counts as one document.

    Returns:
        the splits that have a share, by name.

    Raises:
        InputError: a file holds no ids, or a split would be empty or stand for no text.
    """
    files = [map_file(path, tokenizer) for path in paths]
    n_tokens = sum(map(len, files))
    cuts = [0, *np.round(np.cumsum(shares) / sum(shares) * n_tokens).astype(np.int64).tolist()]
    measure = SampleMeasure(tokenizer)
    splits = {}
    for i, name in enumerate(SPLITS):
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
        splits[name] = TokenizedText(ids, starts, tokenizer.bos_id, n_bytes, n_unknown, n_sampled)
    return splits


def map_file(path: str | Path, tokenizer: Tokenizer) -> np.memmap:
    """Map a file of ids into memory, `(n_tokens,)`; `id_dtype` gives their type.

    Raises:
        InputError: the file is empty, or ends within an id.
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
    """The ids of several files as one sequence, from `start` to before `stop`.

    A slice reads only what it needs, and checks it against the vocabulary.

    Args:
        paths: names of the files, for errors.
        files: the ids of each file, `(n_tokens,)`.
        n_words: size of the vocabulary.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        files: Sequence[np.ndarray],
        n_words: int,
        start: int,
        stop: int,
    ):
        self.paths, self.files, self.n_words = paths, files, n_words
        self.start, self.stop = start, stop
        self.ends = np.cumsum([len(file) for file in files], dtype=np.int64)

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, where: slice) -> np.ndarray:
        """
        Raises:
            InputError: an id is not in the vocabulary.
        """
        start, stop, _ = where.indices(len(self))
        start, stop = self.start + start, self.start + stop
        slices = [self.files[0][:0]]
        i = int(self.ends.searchsorted(start, side="right"))
        while start < stop:
            offset = start - (int(self.ends[i]) - len(self.files[i]))
            ids = self.files[i][offset : offset + stop - start]
            if ids.max() >= self.n_words:
                place = int(np.argmax(ids >= self.n_words))
                raise InputError(
                    f"{self.paths[i]}: id {ids[place]} at position {offset + place} (from 0), but "
                    f"the tokenizer has {self.n_words} pieces; name the one that made the ids with "
                    "--tokenizer-path"
                )
            slices.append(ids)
            start += len(ids)
            i += 1
        return np.concatenate(slices)


class SampleMeasure:
    """Measures the text that ids stand for, without decoding them.

    A piece has the bytes of its text, BOS and EOS have none, an unknown character has one. The
    space that the tokenizer adds at the beginning of a text does not count.

    Attributes:
        n_bytes: number of bytes of each piece.
        has_space: whether a piece begins with a space that may be an added one.
    """

    def __init__(self, tokenizer: Tokenizer):
        model = tokenizer.sp_model
        self.bos_id, self.unk_id = tokenizer.bos_id, model.unk_id()
        self.text_ends = [tokenizer.bos_id, tokenizer.eos_id]
        self.n_bytes = np.zeros(tokenizer.n_words, np.int64)
        self.has_space = np.zeros(tokenizer.n_words, bool)
        adds_space = model.encode_as_pieces("a")[0].startswith("▁")
        for i in range(tokenizer.n_words):
            piece = model.id_to_piece(i)
            if model.is_byte(i) or model.is_unknown(i):
                self.n_bytes[i] = 1
            elif not model.is_control(i):
                self.n_bytes[i] = len(piece.replace("▁", " ").encode())
                self.has_space[i] = adds_space and piece.startswith("▁")

    def __call__(self, ids: TokenFiles) -> tuple[int, int, int]:
        """Measure all ids except the first, which is not predicted.

        Of more than `N_BLOCKS * BLOCK` ids, this many are measured, in evenly spaced blocks.

        Returns:
            number of measured ids without BOS, of their bytes, and of unknown characters.
        """
        n_targets = max(0, len(ids) - 1)
        starts, size = [0], n_targets
        if n_targets > N_BLOCKS * BLOCK:
            starts = np.linspace(0, n_targets - BLOCK, N_BLOCKS).astype(np.int64).tolist()
            size = BLOCK
        n_tokens = n_bytes = n_unknown = 0
        for start in starts:
            block = ids[start : start + size + 1]
            previous, targets = block[:-1], block[1:]
            added_spaces = self.has_space[targets] & np.isin(previous, self.text_ends)
            n_bytes += int(self.n_bytes[targets].sum() - added_spaces.sum())
            n_tokens += int((targets != self.bos_id).sum())
            n_unknown += int((targets == self.unk_id).sum())
        return n_tokens, n_bytes, n_unknown
