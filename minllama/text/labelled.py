"""Labelled sentences: files of `label ||| sentence` lines, read, checked and tokenized."""

import io
import json
import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import Dataset

from minllama.common.errors import InputError, missing_file
from minllama.text.batches import Example, collate
from tokenizer import Tokenizer

SEPARATOR = " ||| "
MAX_LABELS = 10_000
MAX_NAME_LENGTH = 200  # characters


class LabelledSentence(NamedTuple):
    """A line of a file."""

    label: int
    sentence: str


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
        try:
            label, sentence = line.split(SEPARATOR, maxsplit=1)
            sentences.append(LabelledSentence(int(label), sentence.strip()))
        except ValueError:  # of either line
            raise InputError(
                f"{filename}, line {number}: expected 'label ||| sentence' with an integer label, "
                f"found {line[:40]!r}"
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
        InputError: it is not a list of 2 to `MAX_LABELS` different names, none too long.
    """
    if not Path(filename).is_file():
        raise missing_file(filename)
    try:
        names = json.loads(Path(filename).read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{filename}: not JSON: {error}") from error
    if (
        not isinstance(names, list)
        or not 2 <= len(names) <= MAX_LABELS
        or not all(isinstance(name, str) and name.strip() for name in names)
        or any(len(name) > MAX_NAME_LENGTH for name in names)
        or len(set(names)) < len(names)
    ):
        raise InputError(
            f"{filename}: expected a JSON list of 2 to {MAX_LABELS:,} different names of at most "
            f'{MAX_NAME_LENGTH} characters, such as ["bad", "good"]'
        )
    return names


def encode(
    sentences: Sequence[LabelledSentence],
    tokenizer: Tokenizer,
    lower: bool = False,
    eos: bool = False,
    prompt_suffix: str | None = None,
) -> list[Example]:
    """Tokenize labelled sentences. The ids of each begin with BOS.

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
    """Read and `encode` a file of labelled sentences, and print their number.

    Args:
        flag: "train" also returns the number of different labels.
    """
    examples = encode(read_labelled(filename), tokenizer, lower, eos, prompt_suffix)
    print(f"load {len(examples)} data from {filename}")
    if flag == "train":
        return examples, len({example.label for example in examples})
    return examples


def fit_context(*splits: Sequence[Example], max_len: int, keep: str) -> list[list[Example]]:
    """Truncate examples of more than `max_len` ids to BOS and their first or last ids.

    One warning counts the truncated examples.

    Args:
        keep: "first" or "last".

    Raises:
        InputError: `max_len` has no room for BOS and another id.
    """
    if max_len < 2:
        raise InputError(f"a context of {max_len} tokens has no room for a sentence after BOS")
    window = slice(1, max_len) if keep == "first" else slice(1 - max_len, None)
    fitted, n_truncated = [], 0
    for split in splits:
        examples = list(split)
        for i, example in enumerate(examples):
            if len(example.ids) > max_len:
                examples[i] = example._replace(ids=[example.ids[0], *example.ids[window]])
                n_truncated += 1
        fitted.append(examples)
    if n_truncated:
        warnings.warn(
            f"{n_truncated} of {sum(map(len, fitted))} sentences do not fit the context "
            f"and were truncated to their {keep} {max_len} tokens",
            stacklevel=2,
        )
    return fitted


def few_shot(
    sentences: Sequence[LabelledSentence], shots: int, num_labels: int, seed: int
) -> list[LabelledSentence]:
    """Draw `shots` sentences of each label; they stay in the order of the data.

    Raises:
        InputError: a label has fewer.
    """
    chosen: list[int] = []
    generator = random.Random(seed)
    for label in range(num_labels):
        candidates = [i for i, each in enumerate(sentences) if each.label == label]
        if len(candidates) < shots:
            raise InputError(f"--shots {shots}: label {label} has {len(candidates)} sentences")
        chosen += generator.sample(candidates, shots)
    return [sentences[i] for i in sorted(chosen)]


class LlamaDataset(Dataset):
    """The assignment's dataset, whose collate function tokenizes the sentences.

    Args:
        dataset: `[(sentence, label, ids)]`; the ids are not used.
        args: any object with `max_sentence_len`, and optionally `tokenizer_path`.
        eos: end the ids with EOS.
    """

    def __init__(self, dataset: Sequence[tuple[str, int, list[int]]], args: Any, eos: bool = False):
        self.dataset, self.p, self.eos = dataset, args, eos
        self.tokenizer = Tokenizer(args.max_sentence_len, getattr(args, "tokenizer_path", None))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, idx: int) -> tuple[str, int, list[int]]:
        return self.dataset[idx]

    def collate_fn(self, all_data: Sequence[tuple[str, int, list[int]]]) -> dict[str, Any]:
        """The `token_ids`, `labels` and `sents` of a `Batch`, as a dict."""
        sentences = [LabelledSentence(label, sentence) for sentence, label, _ in all_data]
        batch = collate(encode(sentences, self.tokenizer, eos=self.eos), self.tokenizer.pad_id)
        return {"token_ids": batch.token_ids, "labels": batch.labels, "sents": batch.sents}
