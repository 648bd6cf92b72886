"""Labelled sentences: files of `label ||| sentence` lines, read, tokenized and batched."""

import functools
import io
import json
import math
import random
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler

from minllama.common.errors import InputError, missing_file
from tokenizer import Tokenizer

SEPARATOR = " ||| "
MOST_LABELS = 10_000
LONGEST_NAME = 200  # characters of a label's
POOL = 100  # batches that are formed together in training

Example = tuple[str, int, list[int]]  # sentence, label, token ids


def read_labelled(filename: str | Path) -> list[tuple[int, str]]:
    """Read a file of `label ||| sentence` lines, one `(label, sentence)` for each.

    UTF-8, with or without a byte order mark; lines may end as on Unix or on Windows.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: a line is not as it should be, or there is none; the message has its number.
    """
    if not Path(filename).is_file():
        raise missing_file(filename)
    content = Path(filename).read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content[: error.start].count(b"\n") + 1
        raise InputError(f"{filename}, line {number}: not UTF-8 text; save it as UTF-8") from error
    examples = []
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        label, separator, sentence = line.partition(SEPARATOR)
        if not separator:
            raise InputError(
                f"{filename}, line {number}: expected 'label ||| sentence', found {line[:40]!r}"
            )
        try:
            examples.append((int(label), sentence.strip()))
        except ValueError:
            raise InputError(
                f"{filename}, line {number}: expected an integer label before '|||', "
                f"found {label[:40]!r}"
            ) from None
    if not examples:
        raise InputError(f"{filename}, line 1: expected 'label ||| sentence', found an empty file")
    return examples


def check_labels(filename: str | Path, num_labels: int, known_from: str | Path) -> None:
    """Read a file only to see that every label is one of 0, …, `num_labels` - 1.

    Args:
        known_from: the file that says how many labels there are, for the message.

    Raises:
        InputError: one is not, or `read_labelled` cannot read the file.
    """
    for number, (label, _) in enumerate(read_labelled(filename), start=1):
        if not 0 <= label < num_labels:
            raise InputError(
                f"{filename}, line {number}: expected a label from 0 to {num_labels - 1} "
                f"({known_from} has {num_labels} labels), found {label}"
            )


def load_label_names(filename: str | Path) -> list[str]:
    """Read a JSON list of label names; a name's place in it is its label.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: it is no list of different names, of two to `MOST_LABELS`.
    """
    if not Path(filename).is_file():
        raise missing_file(filename)
    try:
        names = json.loads(Path(filename).read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{filename}: not JSON: {error}") from error
    if isinstance(names, list) and len(names) > MOST_LABELS:
        raise InputError(f"{filename}: {len(names):,} names; --label-names takes {MOST_LABELS:,}")
    if isinstance(names, list) and any(len(str(name)) > LONGEST_NAME for name in names):
        raise InputError(f"{filename}: a name of over {LONGEST_NAME} characters; shorten it")
    if (
        not isinstance(names, list)
        or len(names) < 2
        or not all(isinstance(name, str) and name.strip() for name in names)
        or len(set(names)) < len(names)
    ):
        raise InputError(
            f'{filename}: expected a JSON list of two or more names, all different: ["bad", "good"]'
        )
    return names


def create_data(
    filename: str | Path,
    tokenizer: Tokenizer,
    flag: str = "train",
    lower: bool = False,
    eos: bool = True,
    prompt_suffix: str | None = None,
) -> list[Example] | tuple[list[Example], int]:
    """Read and tokenize a file of labelled sentences, and print how many there are.

    Args:
        flag: "train" returns the number of different labels too.
        lower: turn the sentences into lower case.
        eos: end each row of ids with EOS. All begin with BOS.
        prompt_suffix: text that follows each sentence after a space.

    Returns:
        `[(sentence, label, ids)]`, in the file's order.
    """
    data = encode_labelled(filename, tokenizer, lower, eos, prompt_suffix)
    print(f"load {len(data)} data from {filename}")
    return (data, len({label for _, label, _ in data})) if flag == "train" else data


def encode_labelled(
    filename: str | Path,
    tokenizer: Tokenizer,
    lower: bool = False,
    eos: bool = False,
    prompt_suffix: str | None = None,
) -> list[Example]:
    """What `create_data` returns, without a word."""
    data = []
    for label, sentence in read_labelled(filename):
        if lower:
            sentence = sentence.lower()
        if prompt_suffix is not None:
            sentence = f"{sentence} {prompt_suffix}"
        data.append((sentence, label, tokenizer.encode(sentence, bos=True, eos=eos)))
    return data


def fit_context(*splits: Sequence[Example], max_len: int, keep: str) -> list[list[Example]]:
    """Cut rows of more than `max_len` ids to BOS and their first or last tokens.

    One warning counts the rows that were cut.

    Args:
        keep: "first" or "last".

    Raises:
        InputError: there is no room for BOS and another token.
    """
    if max_len < 2:
        raise InputError(f"a context of {max_len} tokens has no room for a sentence behind BOS")
    window = slice(1, max_len) if keep == "first" else slice(1 - max_len, None)
    n_cut = sum(len(tokens) > max_len for data in splits for _, _, tokens in data)
    if n_cut:
        total = sum(len(data) for data in splits)
        warnings.warn(
            f"{n_cut} of {total} rows do not fit the context "
            f"and were cut to their {keep} {max_len} tokens",
            stacklevel=2,
        )

    def fit(tokens: list[int]) -> list[int]:
        return tokens if len(tokens) <= max_len else [tokens[0], *tokens[window]]

    return [[(sentence, label, fit(tokens)) for sentence, label, tokens in d] for d in splits]


def few_shot(data: Sequence[Example], shots: int, num_labels: int, seed: int) -> list[Example]:
    """Some sentences of each label, in the data's order.

    Raises:
        InputError: a label does not have so many.
    """
    chosen: list[int] = []
    generator = random.Random(seed)
    for label in range(num_labels):
        rows = [i for i, example in enumerate(data) if example[1] == label]
        if len(rows) < shots:
            raise InputError(f"--shots {shots}: label {label} has {len(rows)} sentences")
        chosen += generator.sample(rows, shots)
    return [data[i] for i in sorted(chosen)]


class LlamaDataset(Dataset):
    """Labelled sentences, with the collate function that tokenizes them and pads them into batches.

    As in the assignment a row's sentence counts, not its ids: it is encoded as `args` and `eos`
    say, once.

    Args:
        dataset: `[(sentence, label, ids)]`.
        args: any object with `max_sentence_len`, and optionally `tokenizer_path`.
        eos: whether rows end with EOS.
    """

    def __init__(self, dataset: Sequence[Example], args: Any, eos: bool = False):
        self.dataset = dataset
        self.p = args
        self.tokenizer = Tokenizer(args.max_sentence_len, getattr(args, "tokenizer_path", None))
        self.eos = eos
        self._encoded: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, idx: int) -> Example:
        return self.dataset[idx]

    def token_ids(self, row: Example) -> list[int]:
        """The ids of a row, BOS in front."""
        sentence = row[0]
        if sentence not in self._encoded:
            self._encoded[sentence] = self.tokenizer.encode(sentence, bos=True, eos=self.eos)
        return self._encoded[sentence]

    def collate_fn(self, all_data: Sequence[Example]) -> dict[str, Any]:
        """A batch, without lengths, as `pad_rows` makes it."""
        rows = [(row[0], row[1], self.token_ids(row)) for row in all_data]
        return pad_rows(rows, self.tokenizer.pad_id)


def pad_rows(rows: Sequence[Example], pad_id: int, *, with_lengths: bool = False) -> dict[str, Any]:
    """Make a batch; rows are padded on the right to the longest.

    Returns:
        `token_ids` `(batch, seqlen)`, `labels` `(batch,)`, the list `sents`, and where asked for
        `lengths` `(batch,)`.
    """
    ids = [torch.tensor(tokens) for _, _, tokens in rows]
    batch = {
        "token_ids": pad_sequence(ids, batch_first=True, padding_value=pad_id),
        "labels": torch.tensor([label for _, label, _ in rows]),
        "sents": [sentence for sentence, _, _ in rows],
    }
    if with_lengths:
        batch["lengths"] = torch.tensor([len(tokens) for tokens in ids])
    return batch


def make_loader(
    data: Sequence[Example],
    batch_size: int,
    pad_id: int,
    *,
    causal: bool,
    shuffle: bool = False,
    with_lengths: bool = False,
) -> DataLoader:
    """Batches as the assignment forms them; for a causal model, of rows of about the same length.

    Args:
        data: rows with the very ids that a model is to read.
        shuffle: for training.
        with_lengths: let batches carry the rows' lengths; for a causal model they always do.
    """
    collate = functools.partial(pad_rows, pad_id=pad_id, with_lengths=causal or with_lengths)
    if not causal:
        return DataLoader(data, shuffle=shuffle, batch_size=batch_size, collate_fn=collate)
    sampler = LengthBatchSampler if shuffle else SortedBatchSampler
    batches = sampler([len(ids) for _, _, ids in data], batch_size)
    # Every pass over a loader draws a number; evaluation shall not change what training draws.
    generator = None if shuffle else torch.Generator()
    return DataLoader(data, batch_sampler=batches, collate_fn=collate, generator=generator)


class LengthBatchSampler(Sampler[list[int]]):
    """Training batches: every row once an epoch, in an order from the global generator.

    The rows are shuffled; pools of `POOL` batches are sorted by length and cut into batches, whose
    order is shuffled again. The largest batch, padding included, comes first, so that running out
    of memory shows at once. The last batch of the last pool may be smaller.

    Args:
        lengths: of the rows.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int):
        self.lengths, self.batch_size = lengths, batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        rows = torch.randperm(len(self.lengths)).tolist()
        batches = []
        for pool in cut(rows, POOL * self.batch_size):
            pool.sort(key=self.lengths.__getitem__, reverse=True)
            batches += cut(pool, self.batch_size)
        batches = [batches[i] for i in torch.randperm(len(batches)).tolist()]
        largest = max(
            range(len(batches)), key=lambda i: len(batches[i]) * self.lengths[batches[i][0]]
        )
        batches[0], batches[largest] = batches[largest], batches[0]
        return iter(batches)


class SortedBatchSampler(Sampler[list[int]]):
    """Evaluation batches: the rows from the longest to the shortest.

    Attributes:
        order: the row at each place of that order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int):
        self.order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.order) / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(cut(self.order, self.batch_size))

    def restored(self, results: Sequence[Any]) -> list[Any]:
        """What came in the order of the batches, in that of the rows."""
        by_row = dict(zip(self.order, results, strict=True))
        return [by_row[row] for row in range(len(self.order))]


def cut(rows: list[int], size: int) -> list[list[int]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]
