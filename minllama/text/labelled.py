"""Labelled sentences: files of `label ||| sentence` lines, read, checked and tokenized."""

import json
import random
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from minllama.checkpoints.formats import find_tokenizer
from minllama.common.errors import InputError, missing_file
from minllama.text.batches import Example, collate
from minllama.text.lines import lines_of
from tokenizer import Tokenizer

SEPARATOR = " ||| "
MAX_LABELS = 10_000
UNLABELLED = -1  # the label of all lines of a test set whose labels are secret


def read_labelled(filename: str | Path) -> list[Example]:
    """Read a file of `label ||| sentence` lines in UTF-8.

    Raises:
        FileNotFoundError: the file does not exist.
        InputError: a line is malformed (the message has its number), or the file is empty.
    """
    sentences = []
    for number, line in enumerate(lines_of(filename) or [""], start=1):
        try:
            label, sentence = line.split(SEPARATOR, maxsplit=1)
            sentences.append(Example(sentence.strip(), int(label)))
        except ValueError:  # of either line
            raise InputError(
                f"{filename}, line {number}: expected 'label ||| sentence' with an integer label, "
                f"found {line[:40]!r}"
            ) from None
    return sentences


def read_splits(
    paths: dict[str, str], num_labels: int | None = None, known_from: str = ""
) -> tuple[dict[str, list[Example]], int]:
    """Read the files of some splits, check their labels, and return the number of labels too.

    Args:
        paths: the file of each split.
        num_labels: None counts the labels of train.
        known_from: the file that defines the number of labels, for messages.
    """
    examples = {split: read_labelled(path) for split, path in paths.items()}
    if num_labels is None:
        known_from = paths["train"]
        num_labels = len({example.label for example in examples["train"]})
    for split, path in paths.items():
        is_unlabelled = all(example.label == UNLABELLED for example in examples[split])
        if not (split == "test" and is_unlabelled):
            check_labels(examples[split], path, num_labels, known_from)
    return examples, num_labels


def check_labels(
    sentences: Sequence[Example], filename: str | Path, num_labels: int, known_from: str | Path
) -> None:
    """Check that every label of a file is in the range that the file `known_from` defines."""
    for number, (_, label, _) in enumerate(sentences, start=1):
        if not 0 <= label < num_labels:
            raise InputError(
                f"{filename}, line {number}: expected a label from 0 to {num_labels - 1} "
                f"({known_from} has {num_labels} labels), found {label}"
            )


def load_label_names(filename: str | Path) -> list[str]:
    """Read a JSON list of 2 to `MAX_LABELS` different names, one for each label."""
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
        or any(re.search(r"[\t\r\n]", name) for name in names)
        or len(set(names)) < len(names)
    ):
        raise InputError(
            f"{filename}: expected a JSON list of 2 to {MAX_LABELS:,} different names without tabs "
            'and line breaks, such as ["bad", "good"]'
        )
    return names


def encode(sentences: Sequence[Example], tokenizer: Tokenizer, eos: bool = False) -> list[Example]:
    """Tokenize labelled sentences, each after BOS."""
    return [
        Example(sentence, label, tokenizer.encode(sentence, bos=True, eos=eos))
        for sentence, label, _ in sentences
    ]


def create_data(
    filename: str | Path,
    tokenizer: Tokenizer,
    flag: str = "train",
    lower: bool = False,
    eos: bool = True,
    prompt_suffix: str | None = None,
) -> list[Example] | tuple[list[Example], int]:
    """Read and tokenize a file of labelled sentences, and print their number.

    With "train" as `flag`, return the number of different labels too.
    """
    suffix = "" if prompt_suffix is None else f" {prompt_suffix}"
    sentences = [
        Example((sentence.lower() if lower else sentence) + suffix, label)
        for sentence, label, _ in read_labelled(filename)
    ]
    print(f"load {len(sentences)} data from {filename}")
    examples = encode(sentences, tokenizer, eos)
    if flag == "train":
        return examples, len({example.label for example in examples})
    return examples


def fit_context(*splits: Sequence[Example], max_len: int, keep: str) -> list[list[Example]]:
    """Truncate examples of more than `max_len` ids to BOS and their first or last ids, and warn.

    Args:
        keep: "first" or "last".
    """
    if max_len < 2:
        raise InputError(f"a context of {max_len} tokens has no room for a sentence after BOS")
    window = slice(1, max_len) if keep == "first" else slice(1 - max_len, None)
    fitted, n_truncated = [list(split) for split in splits], 0
    for split in fitted:
        for i, example in enumerate(split):
            if len(example.ids) > max_len:
                split[i] = example._replace(ids=[example.ids[0], *example.ids[window]])
                n_truncated += 1
    if n_truncated:
        warnings.warn(
            f"{n_truncated} of {sum(map(len, fitted))} sentences do not fit the context "
            f"and were truncated to their {keep} {max_len} tokens",
            stacklevel=2,
        )
    return fitted


def few_shot(sentences: Sequence[Example], shots: int, num_labels: int, seed: int) -> list[Example]:
    """Draw `shots` sentences of each label; they stay in order. A label may not have fewer."""
    chosen: list[int] = []
    generator = random.Random(seed)
    for label in range(num_labels):
        candidates = [i for i, each in enumerate(sentences) if each.label == label]
        if len(candidates) < shots:
            raise InputError(f"--shots {shots}: label {label} has {len(candidates)} sentences")
        chosen += generator.sample(candidates, shots)
    return [sentences[i] for i in sorted(chosen)]


class LlamaDataset(Dataset):
    """The assignment's dataset. Its collate function tokenizes the sentences again."""

    def __init__(
        self, dataset: Sequence[tuple[str, int, Sequence[int]]], args: Any, eos: bool = False
    ):
        self.dataset, self.p, self.eos = dataset, args, eos
        path = getattr(args, "tokenizer_path", None)
        if path is None and hasattr(args, "pretrained_model_path"):
            path = find_tokenizer(args.pretrained_model_path)
        self.tokenizer = Tokenizer(args.max_sentence_len, path)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, idx: int) -> tuple[str, int, Sequence[int]]:
        return self.dataset[idx]

    def pad_data(
        self, data: Sequence[tuple[str, int, Sequence[int]]]
    ) -> tuple[Any, Any, list[str]]:
        """The `token_ids`, `labels` and `sents` of a `Batch`."""
        examples = encode([Example(*item) for item in data], self.tokenizer, self.eos)
        batch = collate(examples, self.tokenizer.pad_id)
        return batch.token_ids, batch.labels, batch.sents

    def collate_fn(self, all_data: Sequence[tuple[str, int, Sequence[int]]]) -> dict[str, Any]:
        """Pad examples into a dict of what `pad_data` returns."""
        return dict(zip(("token_ids", "labels", "sents"), self.pad_data(all_data), strict=True))
