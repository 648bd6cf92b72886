"""The tokenizer of a pre-training run, and its text as token ids on disk.

A folder has for each split the ids, each document after its BOS, and the positions of the BOS.
`index.json` has sizes and fingerprints; it is written last.
"""

import itertools
import json
import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from minllama.common.errors import InputError
from minllama.common.files import atomic_write, file_fingerprint
from minllama.text.documents import SPLITS, Chunk, Corpus
from minllama.text.token_files import TokenizedText, holds_token_ids, id_dtype, open_token_files
from minllama.text.tokenizer_training import train_tokenizer
from tokenizer import Tokenizer

INDEX = "index.json"
FILES = [f"{split}{suffix}" for split in SPLITS for suffix in (".bin", ".starts.bin")]
COUNTERS = ("n_bytes", "n_tokens", "n_unknown", "n_documents")  # of each split, in the index
N_CHECKED, MAX_CHECKED = 1000, 1000  # texts that `warn_if_lossy` reads, and characters of each
START = np.dtype("<i8")  # type of a position in a file of starts


def prepare_corpus(
    paths: Sequence[str],
    shares: Sequence[float],
    vocab_size: int,
    existing: Tokenizer | None,
    tokenizer_path: Path,
    tokens_folder: Path,
) -> tuple[Tokenizer, dict[str, TokenizedText]]:
    """Train or copy the tokenizer and tokenize the text, unless an earlier run has left them.

    Args:
        existing: the tokenizer to copy; None trains one of `vocab_size` pieces on the training
            split.
    """
    corpus = Corpus(paths, shares)
    if not tokenizer_path.is_file():
        if existing is None:
            train_tokenizer(corpus.training_texts, vocab_size, tokenizer_path)
        else:
            with atomic_write(tokenizer_path, "wb") as file:
                file.write(existing.model_path.read_bytes())
    tokenizer = Tokenizer(tokenizer_model=tokenizer_path)
    if holds_token_ids(paths):
        return tokenizer, open_token_files(paths, shares, tokenizer)
    return tokenizer, tokenize(corpus, tokenizer, tokens_folder)


def tokenize(corpus: Corpus, tokenizer: Tokenizer, folder: Path) -> dict[str, TokenizedText]:
    """Write the ids of each split to `folder`, unless an earlier run left them there intact.

    Raises:
        InputError: a split would be empty, or the folder has the ids of another tokenizer.
    """
    index = _read_index(folder)
    if index is None:
        texts = (chunk.text for _, chunk in corpus.split_chunks())
        warn_if_lossy(tokenizer, itertools.islice(texts, N_CHECKED))
        folder.mkdir(exist_ok=True)
        index = _write_ids(corpus, tokenizer, folder)
        index |= {"files": _fingerprints(folder), "tokenizer": tokenizer.fingerprint}
        with atomic_write(folder / INDEX) as file:
            json.dump(index, file)
    elif index["tokenizer"] != tokenizer.fingerprint:
        raise InputError(
            f"{tokenizer.model_path}: not the tokenizer that made {folder}; put it back, or name "
            "another --output_dir"
        )
    return {
        split: TokenizedText(
            [np.memmap(folder / f"{split}.bin", id_dtype(tokenizer), mode="r")],
            np.memmap(folder / f"{split}.starts.bin", START, mode="r"),
            tokenizer,
            index[split]["n_bytes"],
            index[split]["n_unknown"],
        )
        for split in SPLITS
        if index[split]["n_tokens"]
    }


def warn_if_lossy(tokenizer: Tokenizer, texts: Iterable[str]) -> None:
    """Warn if decoding does not give texts back, as a tokenizer that joins spaces does not."""
    for text in texts:
        text = text[:MAX_CHECKED]
        ids = tokenizer.encode(text, bos=False, eos=False, truncate=False)
        back = tokenizer.decode(ids)
        if back != text and tokenizer.sp_model.unk_id() not in ids:
            pairs = enumerate(zip(text, back, strict=False))
            start = max(0, next((i for i, (a, b) in pairs if a != b), len(back)) - 5)
            warnings.warn(
                f"{tokenizer.model_path}: does not give the text back; "
                f"{text[start : start + 20]!r} comes back as {back[start : start + 20]!r}. A model "
                "cannot learn what is lost, and its bits per byte look better than they are",
                stacklevel=2,
            )
            return


def encode_chunk(tokenizer: Tokenizer, chunk: Chunk) -> list[int]:
    """The ids of a chunk, after BOS if it begins a document."""
    if chunk.begins:
        return tokenizer.encode(chunk.text, bos=True, eos=False)
    # The line break is never part of a longer piece, and keeps the tokenizer from adding a space.
    n_before = len(tokenizer.encode("\n", bos=False, eos=False))
    return tokenizer.encode(f"\n{chunk.text}", bos=False, eos=False)[n_before:]


def _write_ids(corpus: Corpus, tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """Tokenize the texts into the files of each split, and return the counters of each."""
    counts = {split: dict.fromkeys(COUNTERS, 0) for split in SPLITS}
    with ExitStack() as stack:
        files = {name: stack.enter_context(atomic_write(folder / name, "wb")) for name in FILES}
        bar = stack.enter_context(corpus.progress_bar("tokenize"))
        for split, chunk in corpus.split_chunks():
            ids, n_bytes = encode_chunk(tokenizer, chunk), len(chunk.text.encode())
            count = counts[split]
            if chunk.begins:
                files[f"{split}.starts.bin"].write(np.array(count["n_tokens"], START).tobytes())
            files[f"{split}.bin"].write(np.array(ids, id_dtype(tokenizer)).tobytes())
            count["n_bytes"] += n_bytes
            count["n_tokens"] += len(ids)
            count["n_unknown"] += ids.count(tokenizer.sp_model.unk_id())
            count["n_documents"] += chunk.begins
            bar.update(n_bytes)
        for split, share in zip(SPLITS, corpus.shares, strict=True):
            if share and counts[split]["n_tokens"] == counts[split]["n_documents"]:  # only BOS
                raise InputError(f"{corpus}: no text for {split}; give more, or another --split")
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
