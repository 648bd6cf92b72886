"""Labelled sentences: files of `label ||| sentence` lines, read, tokenized and batched."""

import functools
import io
import json
import math
import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from minllama.common.errors import InputError, missing_file
from tokenizer import Tokenizer

T = TypeVar("T")

SEPARATOR = " ||| "
MAX_LABELS = 10_000
MAX_NAME_LENGTH = 200  # characters
POOL = 100  # batches that are sorted by length together in training


class LabelledSentence(NamedTuple):
    """A line of a file."""

    label: int
    sentence: str


class Example(NamedTuple):
    """A tokenized sentence and its label."""

    sentence: str
    label: int
    ids: list[int]


@dataclass
class Batch:
    """Examples, padded on the right to the longest.

    Attributes:
        token_ids: `(batch, seqlen)`.
        labels: `(batch,)`.
        sents: the sentences.
        lengths: number of ids of each example before padding, `(batch,)`.
    """

    token_ids: torch.Tensor
    labels: torch.Tensor
    sents: list[str]
    lengths: torch.Tensor | None = None

    def select(self, examples: slice) -> "Batch":
        """A batch of some of the examples, padded as this one."""
        lengths = None if self.lengths is None else self.lengths[examples]
        return Batch(self.token_ids[examples], self.labels[examples], self.sents[examples], lengths)


def collate(examples: Sequence[Example], pad_id: int, with_lengths: bool = False) -> Batch:
    """Pad examples into a batch."""
    ids = [torch.tensor(example.ids) for example in examples]
    return Batch(
        token_ids=pad_sequence(ids, batch_first=True, padding_value=pad_id),
        labels=torch.tensor([example.label for example in examples]),
        sents=[example.sentence for example in examples],
        lengths=torch.tensor([len(tokens) for tokens in ids]) if with_lengths else None,
    )


def read_labelled(filename: str | Path) -> list[LabelledSentence]:
    """Read a file of `label ||| sentence` lines.

    UTF-8, with or without a byte order mark; lines may end as on Unix or on Windows.

    Raises:
        FileNotFoundError: the file does not exist.
        InputError: a line is malformed (the message has its number), or the file is empty.
    """
    if not Path(filename).is_file():
        raise missing_file(filename)
    content = Path(filename).read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content[: error.start].count(b"\n") + 1
        raise InputError(f"{filename}, line {number}: not UTF-8 text; save it as UTF-8") from error
    sentences = []
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        label, separator, sentence = line.partition(SEPARATOR)
        if not separator:
            raise InputError(
                f"{filename}, line {number}: expected 'label ||| sentence', found {line[:40]!r}"
            )
        try:
            sentences.append(LabelledSentence(int(label), sentence.strip()))
        except ValueError:
            raise InputError(
                f"{filename}, line {number}: expected an integer label before '|||', "
                f"found {label[:40]!r}"
            ) from None
    if not sentences:
        raise InputError(f"{filename}, line 1: expected 'label ||| sentence', found an empty file")
    return sentences


def check_labels(
    sentences: Sequence[LabelledSentence],
    filename: str | Path,
    num_labels: int,
    known_from: str | Path,
) -> None:
    """Check that every label is one of 0, …, `num_labels` - 1.

    Args:
        sentences: what `read_labelled(filename)` returned.
        known_from: the file that defines the number of labels, for the message.

    Raises:
        InputError: a label is out of range; the message has its line.
    """
    for number, (label, _) in enumerate(sentences, start=1):
        if not 0 <= label < num_labels:
            raise InputError(
                f"{filename}, line {number}: expected a label from 0 to {num_labels - 1} "
                f"({known_from} has {num_labels} labels), found {label}"
            )


def load_label_names(filename: str | Path) -> list[str]:
    """Read a JSON list of label names, in the order of the labels.

    Raises:
        FileNotFoundError: the file does not exist.
        InputError: it is not a list of two to `MAX_LABELS` different names.
    """
    if not Path(filename).is_file():
        raise missing_file(filename)
    try:
        names = json.loads(Path(filename).read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{filename}: not JSON: {error}") from error
    if isinstance(names, list) and len(names) > MAX_LABELS:
        raise InputError(f"{filename}: {len(names):,} names; --label-names takes {MAX_LABELS:,}")
    if isinstance(names, list) and any(len(str(name)) > MAX_NAME_LENGTH for name in names):
        raise InputError(f"{filename}: a name of over {MAX_NAME_LENGTH} characters; shorten it")
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


def encode(
    sentences: Sequence[LabelledSentence],
    tokenizer: Tokenizer,
    lower: bool = False,
    eos: bool = False,
    prompt_suffix: str | None = None,
) -> list[Example]:
    """Tokenize labelled sentences. All ids begin with BOS.

    Args:
        lower: lowercase the sentences.
        eos: end the ids with EOS.
        prompt_suffix: text that follows each sentence after a space.
    """
    examples = []
    for label, sentence in sentences:
        if lower:
            sentence = sentence.lower()
        if prompt_suffix is not None:
            sentence = f"{sentence} {prompt_suffix}"
        examples.append(Example(sentence, label, tokenizer.encode(sentence, bos=True, eos=eos)))
    return examples


def create_data(
    filename: str | Path,
    tokenizer: Tokenizer,
    flag: str = "train",
    lower: bool = False,
    eos: bool = True,
    prompt_suffix: str | None = None,
) -> list[Example] | tuple[list[Example], int]:
    """Read and tokenize a file of labelled sentences, and print their number.

    Args:
        flag: "train" also returns the number of different labels.
        lower, eos, prompt_suffix: see `encode`.

    Returns:
        the examples, in the file's order.
    """
    examples = encode(read_labelled(filename), tokenizer, lower, eos, prompt_suffix)
    print(f"load {len(examples)} data from {filename}")
    if flag == "train":
        return examples, len({example.label for example in examples})
    return examples


def fit_context(*splits: Sequence[Example], max_len: int, keep: str) -> list[list[Example]]:
    """Truncate examples of more than `max_len` ids to BOS and their first or last tokens.

    One warning counts the truncated examples.

    Args:
        keep: "first" or "last".

    Raises:
        InputError: `max_len` has no room for BOS and another token.
    """
    if max_len < 2:
        raise InputError(f"a context of {max_len} tokens has no room for a sentence after BOS")
    window = slice(1, max_len) if keep == "first" else slice(1 - max_len, None)
    n_cut = sum(len(example.ids) > max_len for split in splits for example in split)
    if n_cut:
        total = sum(len(split) for split in splits)
        warnings.warn(
            f"{n_cut} of {total} rows do not fit the context "
            f"and were cut to their {keep} {max_len} tokens",
            stacklevel=2,
        )

    def fit(example: Example) -> Example:
        if len(example.ids) <= max_len:
            return example
        return example._replace(ids=[example.ids[0], *example.ids[window]])

    return [[fit(example) for example in split] for split in splits]


def few_shot(examples: Sequence[Example], shots: int, num_labels: int, seed: int) -> list[Example]:
    """Draw `shots` examples of each label, in the order of the data.

    Raises:
        InputError: a label has fewer.
    """
    chosen: list[int] = []
    generator = random.Random(seed)
    for label in range(num_labels):
        candidates = [i for i, example in enumerate(examples) if example.label == label]
        if len(candidates) < shots:
            raise InputError(f"--shots {shots}: label {label} has {len(candidates)} sentences")
        chosen += generator.sample(candidates, shots)
    return [examples[i] for i in sorted(chosen)]


class LlamaDataset(Dataset):
    """The assignment's dataset, whose collate function tokenizes the sentences.

    Args:
        dataset: `[(sentence, label, ids)]`; the ids are ignored, as in the assignment.
        args: any object with `max_sentence_len`, and optionally `tokenizer_path`.
        eos: end the ids with EOS.
    """

    def __init__(self, dataset: Sequence[tuple[str, int, list[int]]], args: Any, eos: bool = False):
        self.dataset = dataset
        self.p = args
        self.tokenizer = Tokenizer(args.max_sentence_len, getattr(args, "tokenizer_path", None))
        self.eos = eos
        self._ids: dict[str, list[int]] = {}  # of the sentences seen so far

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, idx: int) -> tuple[str, int, list[int]]:
        return self.dataset[idx]

    def encode(self, sentence: str) -> list[int]:
        """Tokenize a sentence the first time that it is seen. The ids begin with BOS."""
        if sentence not in self._ids:
            self._ids[sentence] = self.tokenizer.encode(sentence, bos=True, eos=self.eos)
        return self._ids[sentence]

    def collate_fn(self, all_data: Sequence[tuple[str, int, list[int]]]) -> dict[str, Any]:
        """The fields `token_ids`, `labels` and `sents` of a `Batch`, as a dict."""
        examples = [Example(sent, label, self.encode(sent)) for sent, label, _ in all_data]
        batch = collate(examples, self.tokenizer.pad_id)
        return {"token_ids": batch.token_ids, "labels": batch.labels, "sents": batch.sents}


def make_loader(
    examples: Sequence[Example],
    batch_size: int,
    pad_id: int,
    *,
    causal: bool,
    shuffle: bool = False,
    with_lengths: bool = False,
) -> DataLoader:
    """Batches formed as in the assignment, or for a causal model from examples of similar length.

    Args:
        shuffle: for training.
        with_lengths: give batches their `lengths`; for a causal model they always have them.
    """
    collate_fn = functools.partial(collate, pad_id=pad_id, with_lengths=causal or with_lengths)
    if not causal:
        return DataLoader(examples, shuffle=shuffle, batch_size=batch_size, collate_fn=collate_fn)
    sampler = LengthBatchSampler if shuffle else SortedBatchSampler
    batches = sampler([len(example.ids) for example in examples], batch_size)
    # Each pass over a loader draws a number; evaluation must not change what training draws.
    generator = None if shuffle else torch.Generator()
    return DataLoader(examples, batch_sampler=batches, collate_fn=collate_fn, generator=generator)


class LengthBatchSampler(Sampler[list[int]]):
    """Training batches of similar lengths, in an order from the global generator.

    The examples are shuffled; pools of `POOL` batches are sorted by length and cut into batches,
    whose order is shuffled again. The largest batch, padding included, comes first, so that running
    out of memory shows at once. The last batch of the last pool may be smaller.

    Args:
        lengths: number of ids of each example.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int):
        self.lengths, self.batch_size = lengths, batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(len(self.lengths)).tolist()
        pool_size = POOL * self.batch_size
        batches = []
        for start in range(0, len(order), pool_size):
            pool = order[start : start + pool_size]
            pool.sort(key=self.lengths.__getitem__, reverse=True)
            batches += BatchSampler(pool, self.batch_size, drop_last=False)
        batches = [batches[i] for i in torch.randperm(len(batches)).tolist()]
        sizes = [len(batch) * self.lengths[batch[0]] for batch in batches]
        largest = sizes.index(max(sizes))
        batches[0], batches[largest] = batches[largest], batches[0]
        return iter(batches)


class SortedBatchSampler(BatchSampler):
    """Evaluation batches: the examples from the longest to the shortest.

    Attributes:
        order: the index of the example at each place of that order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int):
        self.order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
        super().__init__(self.order, batch_size, drop_last=False)

    def unsort(self, results: Sequence[T]) -> list[T]:
        """Put results that are in the order of the batches into the order of the data."""
        by_index = dict(zip(self.order, results, strict=True))
        return [by_index[i] for i in range(len(self.order))]
