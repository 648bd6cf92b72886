"""Plain text for pre-training: documents, split and tokenized once into memory-mapped arrays."""

import hashlib
import io
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece
import torch
from torch.utils.data import Dataset

from minllama.common.errors import InputError, missing_file
from minllama.common.files import atomic_write, file_fingerprint
from minllama.common.progress import Bar
from minllama.text.labelled import read_labelled
from tokenizer import Tokenizer

PARTS = ("train", "validation", "test")
DOCUMENT_SEPARATOR = "<|endoftext|>"
LABELLED = re.compile(r"-?\d+ \|\|\| ")
CUT = re.compile(r"(?<=\S) (?=\S)|\n")  # a document may be cut in two before these
BLOCK = 1 << 20  # characters or tokens that are worked on at a time

Chunk = tuple[str, bool]  # text, and whether it begins a document


def read_chunks(path: str | Path, size: int = BLOCK) -> Iterator[Chunk]:
    """The documents of a text, one after the other, in chunks of at least `size` characters.

    Documents stand between lines `<|endoftext|>`; without such a line the file is one. Of a file of
    `label ||| sentence` lines (which is read whole) every sentence is one. White space around a
    document is dropped; a document's chunks together are the document.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: it is not UTF-8.
    """
    if not Path(path).is_file():
        raise missing_file(path)
    try:
        with Path(path).open(encoding="utf-8-sig") as file:
            if LABELLED.match(file.readline(BLOCK)):
                yield from ((sentence, True) for _, sentence in read_labelled(path) if sentence)
                return
            file.seek(0)
            yield from _chunks_of_lines(iter(lambda: file.readline(size), ""), size)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text; save it as UTF-8") from error


def _chunks_of_lines(lines: Iterator[str], size: int) -> Iterator[Chunk]:
    parts: list[str] = []
    length, begins = 0, True
    for line in lines:
        if line.strip() == DOCUMENT_SEPARATOR:
            if last := "".join(parts).rstrip():
                yield last, begins
            parts, length, begins = [], 0, True
            continue
        if begins and not parts:
            line = line.lstrip()
        place = CUT.search(line) if length >= size else None
        if place or length >= size + BLOCK:
            cut = place.start() if place else 0
            yield "".join([*parts, line[:cut]]), begins
            parts, length, begins, line = [], 0, False, line[cut:]
        if line:
            parts.append(line)
            length += len(line)
    if last := "".join(parts).rstrip():
        yield last, begins


def measure(paths: Sequence[str | Path]) -> tuple[int, int]:
    """The number of documents and of bytes in all texts.

    Raises:
        InputError: there is no text.
    """
    n_documents = n_bytes = 0
    for text, begins in _with_progress(
        "read", paths, (chunk for path in paths for chunk in read_chunks(path))
    ):
        n_documents += begins
        n_bytes += len(text.encode())
    if n_bytes == 0:
        raise InputError(f"{_names(paths)}: no text in it; name a file that has some")
    return n_documents, n_bytes


def split_chunks(
    paths: Sequence[str | Path], shares: Sequence[float], measured: tuple[int, int]
) -> Iterator[tuple[str, str, bool]]:
    """The chunks of all texts, each with the name of the part that it belongs to.

    In the order of the text the first of `shares` (by bytes) is for training, the next for
    validation, the last for testing. Documents stay whole, unless there is only one.

    Args:
        measured: what `measure` returned.

    Yields:
        the part, the text, and whether it begins a document there.

    Raises:
        InputError: a part would be empty.
    """
    n_documents, n_bytes = measured
    one_document = n_documents == 1
    size = max(1, min(BLOCK, n_bytes // 1000)) if one_document else BLOCK
    ends = np.cumsum(shares) / sum(shares) * n_bytes
    position, part, used = 0, "", set()
    for path in paths:
        for text, begins in read_chunks(path, size):
            if begins or one_document:
                index = min(2, int(np.searchsorted(ends, position, side="right")))
                begins = begins or PARTS[index] != part
                part = PARTS[index]
                used.add(part)
            position += len(text.encode())
            yield part, text, begins
    empty = [name for name, share in zip(PARTS, shares, strict=True) if share and name not in used]
    if empty:
        raise InputError(
            f"{_names(paths)}: {n_documents} documents of {n_bytes} bytes leave nothing for "
            f"{' and '.join(empty)}; give more text or another --split"
        )


def _names(paths: Sequence[str | Path]) -> str:
    return ", ".join(map(str, paths))


def _with_progress(what: str, paths: Sequence[str | Path], chunks: Iterable) -> Iterator:
    """The same chunks, with a progress bar over the bytes of the texts."""
    total = sum(Path(path).stat().st_size for path in paths if Path(path).is_file())
    with Bar(desc=what, total=total, unit="B", unit_scale=True) as progress:
        for chunk in chunks:
            yield chunk
            progress.update(len(chunk[-2].encode()))


def encode_chunk(tokenizer: Tokenizer, text: str, begins: bool) -> list[int]:
    """The ids of a chunk, BOS in front where it begins a document.

    The ids of a document's chunks together are the document's: a later chunk is encoded behind a
    line break, which never is part of a longer piece, so that nothing is put in front of it.
    """
    if begins:
        return tokenizer.encode(text, bos=True, eos=False)
    n_before = len(tokenizer.encode("\n", bos=False, eos=False))
    return tokenizer.encode(f"\n{text}", bos=False, eos=False)[n_before:]


def train_tokenizer(
    read_texts: Callable[[], Iterable[str]], vocab_size: int, path: str | Path
) -> None:
    """Train a SentencePiece BPE model like Llama's: digits apart, bytes for unknown characters.

    It learns from the lines of the texts (what `read_texts()` gives), cut to 4000 characters each,
    and from a random 250,000 of them where there are more. Where `vocab_size` has no room for the
    256 bytes they are left out, with a warning; unknown characters are then `<unk>`, id 0, which
    also is the padding.

    Raises:
        InputError: the vocabulary is too large or too small for the text.
    """
    failures = []

    def lines() -> Iterator[str]:
        try:
            for text in read_texts():
                for line in text.split("\n"):
                    yield from (line[i : i + 4000] for i in range(0, len(line), 4000))
        except Exception as error:  # SentencePiece would make it one of its own
            failures.append(error)
            raise

    sentencepiece.set_random_generator_seed(0)  # of the sample
    for byte_fallback in (True, False):
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=lines(),
                input_sentence_size=250_000,
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                byte_fallback=byte_fallback,
                character_coverage=0.9995 if byte_fallback else 1.0,
                user_defined_symbols=["\n"],
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                split_digits=True,
                max_sentence_length=16_000,
                minloglevel=2,
            )
        except RuntimeError as error:
            if failures:
                raise failures[0] from None
            known = r"too high \(\d+\).* value <= (\d+)|required_chars. \d+ vs (\d+)"
            found = re.search(known, str(error))
            if found and found[2] and byte_fallback:
                continue
            problem = "the text is too short for a tokenizer of that size"
            if found:
                problem = f"the text allows {'at most' if found[1] else 'no less than'} "
                problem += found[1] or found[2]
            raise InputError(f"--vocab_size {vocab_size}: {problem}; choose another") from error
        if not byte_fallback:
            warnings.warn(
                f"{vocab_size} pieces have no room for bytes: characters that the training part "
                "does not have become <unk> (id 0), and padding is <unk> too",
                stacklevel=2,
            )
        with atomic_write(path, "wb") as file:
            file.write(model.getvalue())
        return


def id_dtype(tokenizer: Tokenizer) -> np.dtype:
    """Of ids in a file: two bytes where they hold every piece, else four; little-endian."""
    return np.dtype("<u2" if tokenizer.n_words <= 1 << 16 else "<u4")


COUNTERS = ("n_bytes", "n_tokens", "n_unknown", "n_documents")  # of a part, in an index
POSITION = np.dtype("<i8")  # where a document starts, in a file


def tokenize(
    paths: Sequence[str | Path],
    shares: Sequence[float],
    measured: tuple[int, int] | None,
    tokenizer: Tokenizer,
    folder: Path,
) -> dict[str, "TokenizedText"]:
    """Write the ids of each part to a file in `folder`, or find them there from an earlier run.

    Every document follows its BOS. Where these are stands in a file of its own, so that no later
    start looks for them. `index.json`, written last, tells sizes and fingerprints. What is damaged
    is made again.

    Args:
        measured: what `measure` returned; None measures the text if it has to be read.

    Returns:
        the parts that have text, by name.

    Raises:
        InputError: there is no text, or what was found is of another tokenizer.
    """
    index_file = folder / "index.json"
    dtype = id_dtype(tokenizer)
    pieces = hashlib.sha256(tokenizer.sp_model.serialized_model_proto()).hexdigest()
    index = _read_index(index_file)
    if index.get("tokenizer", pieces) != pieces:
        raise InputError(
            f"{tokenizer.model_path}: not the tokenizer that made {folder}; put it back, or name "
            "another --output_dir"
        )
    if not _is_whole(folder, index, dtype):
        if measured is None:
            measured = measure(paths)
        folder.mkdir(exist_ok=True)
        index = {name: dict.fromkeys(COUNTERS, 0) for name in PARTS}
        with ExitStack() as stack:
            files = {
                name: stack.enter_context(atomic_write(folder / name, "wb"))
                for part in PARTS
                for name in (f"{part}.bin", f"{part}.starts.bin")
            }
            chunks = split_chunks(paths, shares, measured)
            for part, text, begins in _with_progress("tokenize", paths, chunks):
                ids = encode_chunk(tokenizer, text, begins)
                if begins:
                    start = np.array(index[part]["n_tokens"], POSITION)
                    files[f"{part}.starts.bin"].write(start.tobytes())
                files[f"{part}.bin"].write(np.array(ids, dtype).tobytes())
                index[part]["n_bytes"] += len(text.encode())
                index[part]["n_tokens"] += len(ids)
                index[part]["n_unknown"] += ids.count(tokenizer.sp_model.unk_id())
                index[part]["n_documents"] += begins
            for name, counts in index.items():
                has_bos_only = counts["n_tokens"] == counts["n_documents"]
                if has_bos_only and counts["n_tokens"] > 0:
                    raise InputError(f"{_names(paths)}: the {name} part has no tokens but BOS")
        index["files"] = {name: file_fingerprint(folder / name) for name in files}
        index["tokenizer"] = pieces
        with atomic_write(index_file) as file:
            json.dump(index, file)
    texts = {}
    for name in PARTS:
        counts = index[name]
        if counts["n_tokens"]:
            ids = np.memmap(folder / f"{name}.bin", dtype, mode="r")
            if (folder / f"{name}.starts.bin").is_file():
                starts = np.memmap(folder / f"{name}.starts.bin", POSITION, mode="r")
            else:  # a folder that version 0.1 wrote
                starts = _find(tokenizer.bos_id, ids)
            texts[name] = TokenizedText(
                ids, starts, tokenizer.bos_id, counts["n_bytes"], counts["n_unknown"]
            )
    return texts


def _read_index(path: Path) -> dict:
    """What an index tells; nothing if it is absent or damaged."""
    try:
        index = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return index if isinstance(index, dict) else {}


def _is_whole(folder: Path, index: dict, dtype: np.dtype) -> bool:
    """Whether all that an index tells of is there, and as it was written."""
    try:
        for name, expected in index.get("files", {}).items():  # versions before had none
            if file_fingerprint(folder / name) != expected:
                return False
        for name in PARTS:
            counts = [index[name][counter] for counter in COUNTERS]
            if any(type(count) is not int or count < 0 for count in counts):
                return False
            n_bytes = index[name]["n_tokens"] * dtype.itemsize
            if (folder / f"{name}.bin").stat().st_size != n_bytes:
                return False
            starts, n_bytes = folder / f"{name}.starts.bin", index[name]["n_documents"] * 8
            if starts.exists() and starts.stat().st_size != n_bytes:
                return False
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False
    return True


def _find(bos_id: int, ids: np.ndarray) -> np.ndarray:
    """Where the BOS are, `(n_documents,)`."""
    blocks = range(0, len(ids), BLOCK)
    return np.concatenate([i + np.flatnonzero(ids[i : i + BLOCK] == bos_id) for i in blocks])


class Ids(Protocol):
    """What slices like an array of ids, though it may be in several files."""

    def __len__(self) -> int: ...

    def __getitem__(self, where: slice) -> np.ndarray: ...


class TokenizedText:
    """A part's ids, in files that are mapped into memory.

    Attributes:
        ids: `(n_tokens,)`; of a text every document is behind its BOS.
        starts: where the documents begin, `(n_documents,)`.
        n_bytes: the text's length in UTF-8.
        n_unknown: how many of the ids are unknown characters.
        n_sampled: where the two are of a sample of the ids, its size without BOS; else None.
    """

    def __init__(
        self,
        ids: Ids,
        starts: np.ndarray,
        bos_id: int,
        n_bytes: int,
        n_unknown: int,
        n_sampled: int | None = None,
    ):
        self.ids, self.starts, self.bos_id = ids, starts, bos_id
        self.n_bytes, self.n_unknown, self.n_sampled = n_bytes, n_unknown, n_sampled

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens_per_byte(self) -> float:
        """Without the BOS of the documents, which no text holds."""
        if self.n_sampled is not None:
            return self.n_sampled / self.n_bytes
        return (len(self) - len(self.starts)) / self.n_bytes

    def describe(self) -> str:
        if self.n_sampled is not None:
            size = f"{len(self):,} tokens, of {1 / self.tokens_per_byte:.2f} bytes on average"
            unknown = f"{self.n_unknown / self.n_sampled:.2%}"
        else:
            size = f"{self.n_bytes:,} bytes, {len(self):,} tokens"
            unknown = f"{self.n_unknown:,}"
        if self.n_unknown:
            size += f"\n  {unknown} of them <unk>, which bits per byte cannot account for"
        return size


class Cuts:
    """Documents cut every `step` ids; where a piece begins is computed when it is asked for.

    It holds one number for each document, none for a piece.

    Args:
        starts: where the documents begin, `(n_documents,)`.
        lengths: how many of a document's ids are cut, `(n_documents,)`; is overwritten.
    """

    def __init__(self, starts: np.ndarray, lengths: np.ndarray, step: int):
        self.starts, self.step = starts, step
        np.maximum(lengths, 0, out=lengths)
        lengths += step - 1
        lengths //= step
        self.ends = np.cumsum(lengths, out=lengths)  # the pieces up to and with each document

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, i: int) -> tuple[int, int]:
        """Where piece `i` begins, and the number of its document."""
        document = int(self.ends.searchsorted(i, side="right"))
        n_before = int(self.ends[document - 1]) if document else 0
        return int(self.starts[document]) + self.step * (i - n_before), document


def _document_lengths(text: TokenizedText) -> np.ndarray:
    """How many ids each document has, BOS included, `(n_documents,)`."""
    lengths = np.empty(len(text.starts), np.int64)
    np.subtract(text.starts[1:], text.starts[:-1], out=lengths[:-1])
    lengths[-1] = len(text) - text.starts[-1]
    return lengths


class TrainingRows(Dataset):
    """Rows of `seqlen` ids and their successors, to learn from.

    A row begins where a document does, or `offset` ids and then every `seqlen` further into it, so
    that another offset gives other rows of the same text. It goes on into what follows, so short
    documents are in several rows.

    Args:
        text: more than `seqlen` ids.
    """

    def __init__(self, text: TokenizedText, seqlen: int, offset: int):
        self.text, self.seqlen, self.offset = text, seqlen, offset
        lengths = _document_lengths(text)
        lengths -= offset
        self.inner = Cuts(text.starts, lengths, seqlen)
        self.n_first = len(text.starts) if offset else 0  # rows that begin where a document does

    def __len__(self) -> int:
        return self.n_first + len(self.inner)

    def start_of(self, i: int) -> int:
        """Where in the text row `i` begins."""
        if i < self.n_first:
            start = int(self.text.starts[i])
        else:
            start = self.inner[i - self.n_first][0] + self.offset
        return min(start, len(self.text) - self.seqlen - 1)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        start = self.start_of(i)
        row = self.text.ids[start : start + self.seqlen + 1]
        ids = torch.from_numpy(row.astype(np.int64))
        return ids[:-1], ids[1:]


IGNORED = -100  # a target that does not count, as in F.cross_entropy


class EvaluationRows(Dataset):
    """Rows that predict every id of the documents exactly once, BOS apart.

    A document is cut every `seqlen` ids; ids of padding are BOS, and targets there `IGNORED`.

    Args:
        n_rows: only so many rows, evenly spaced over the text; None takes all.
    """

    def __init__(self, text: TokenizedText, seqlen: int, n_rows: int | None = None):
        self.text, self.seqlen = text, seqlen
        lengths = _document_lengths(text)
        lengths -= 1  # a document's last id is no input
        self.cuts = Cuts(text.starts, lengths, seqlen)
        self.chosen: np.ndarray | None = None
        if n_rows is not None and n_rows < len(self.cuts):
            self.chosen = np.linspace(0, len(self.cuts) - 1, n_rows).astype(np.int64)

    def __len__(self) -> int:
        return len(self.cuts) if self.chosen is None else len(self.chosen)

    def bounds_of(self, i: int) -> tuple[int, int]:
        """Where in the text row `i` begins, and where it ends with its last target."""
        start, document = self.cuts[i if self.chosen is None else int(self.chosen[i])]
        is_last = document + 1 == len(self.text.starts)
        end = len(self.text) if is_last else int(self.text.starts[document + 1])
        return start, min(start + self.seqlen + 1, end)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        start, end = self.bounds_of(i)
        row = torch.from_numpy(self.text.ids[start:end].astype(np.int64))
        tokens = row.new_full((self.seqlen,), self.text.bos_id)
        targets = row.new_full((self.seqlen,), IGNORED)
        tokens[: len(row) - 1], targets[: len(row) - 1] = row[:-1], row[1:]
        return tokens, targets
