"""`--option predict`: label sentences that nobody has labelled, as they come."""

import contextlib
import csv
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import IO, Any, Self

import torch
from torch import nn

from minllama import methods
from minllama.checkpoints.formats import find_tokenizer
from minllama.common.errors import InputError, explain_out_of_memory, missing_file
from minllama.common.files import atomic_write, check_outputs
from minllama.common.flags import DEMO_LABELS, DEMO_MODEL, LESS_MEMORY
from minllama.common.progress import Bar
from minllama.common.settings import flag
from minllama.evaluation.classification import forward_inputs
from minllama.kernels.cpu import keep_freed_memory
from minllama.methods.classify import load
from minllama.methods.saved import read_classifier
from minllama.methods.settings import FinetuneSettings
from minllama.tasks.prompt import Asking, ZeroShotSettings
from minllama.text.batches import Example, SortedBatchSampler, make_loader
from minllama.text.labelled import load_label_names
from minllama.text.prompts import frame
from minllama.training import distributed
from minllama.training.precision import mixed_precision
from tokenizer import TOKENIZER_MODEL, Tokenizer

FIELDS = ("label", "name", "probability")
MOST_BATCHES = 100  # that are formed together, of sentences of about the same length

Label = tuple[int, str | None, float]  # number, name, probability


@dataclass(frozen=True, kw_only=True)
class PredictSettings(ZeroShotSettings):
    """Which sentences are labelled, by what, and where the labels go."""

    title = "predict"
    description = None

    load: str | None = flag(
        None,
        "label with what fine-tuning saved; by default by prompting, which needs --label-names",
        metavar="CHECKPOINT",
    )
    input: str | None = flag(None, "sentences, one on each line; by default standard input")
    output: str | None = flag(None, "where the labels go; by default standard output")
    format: str = flag(
        "text",
        "label, name and probability between tabs, as JSON lines, or as CSV with a header",
        choices=lambda: tuple(WRITERS),
    )

    @classmethod
    def from_flags(cls, values: dict[str, Any]) -> Self:
        """Build the settings from flags; with `load`, absent flags are as the run was saved."""
        explicit = tuple(sorted(values))
        if values.get("load") is not None:
            for name in ("prompt_template", "calibrate"):
                if name in values:
                    raise InputError(
                        f"--{name}: --load does not ask for labels; leave one of them out"
                    )
            values = FinetuneSettings.from_saved_run(values)
        return cls(**cls.known(values), explicit=explicit)

    def resolved(self) -> Self:
        settings = self if self.load is not None else self.with_demo(DEMO_MODEL, DEMO_LABELS)
        path = settings.tokenizer_path or find_tokenizer(settings.pretrained_model_path)
        return settings.replace(tokenizer_path=path)

    @property
    def checkpoints(self) -> list[str]:
        return [self.pretrained_model_path, *([] if self.load is None else [self.load])]


class Labeller:
    """A classifier with what it makes of sentences.

    Args:
        batch_size: rows of a batch.
        names: of the labels, where they are known.
        model: takes what `forward_inputs` gives, to scores `(batch, num_labels)`.
        dtype: of the products, where it is not that of packed weights.
        with_lengths: whether the model reads the number of tokens of each row.
    """

    def __init__(
        self,
        batch_size: int,
        names: list[str] | None,
        model: nn.Module,
        tokenizer: Tokenizer,
        device: torch.device,
        *,
        causal: bool,
        dtype: str = "float32",
        with_lengths: bool = False,
    ):
        self.batch_size, self.names = batch_size, names
        self.model, self.tokenizer, self.device = model.eval(), tokenizer, device
        self.causal, self.dtype, self.with_lengths = causal, dtype, with_lengths

    def rows(self, data: list[Example]) -> list[Example]:
        """What the model reads of sentences with their ids."""
        raise NotImplementedError

    @torch.inference_mode()
    def __call__(self, sentences: list[str]) -> list[Label]:
        """The labels of some sentences, in their order."""
        data = [
            Example(sentence, 0, self.tokenizer.encode(sentence, bos=True, eos=False))
            for sentence in sentences
        ]
        loader = make_loader(
            self.rows(data),
            self.batch_size,
            self.tokenizer.pad_id,
            causal=self.causal,
            with_lengths=self.with_lengths,
        )
        scores = []
        with mixed_precision(self.device, self.dtype):
            for batch in loader:
                scores.append(self.model(*forward_inputs(batch, self.device)).float())
        probabilities, labels = torch.cat(scores).softmax(dim=-1).max(dim=-1)
        if probabilities.isnan().any():
            raise InputError("the model's scores are not finite; it cannot be used")
        found = list(zip(labels.tolist(), probabilities.tolist(), strict=True))
        if isinstance(loader.batch_sampler, SortedBatchSampler):
            found = loader.batch_sampler.unsort(found)
        return [
            (label, None if self.names is None else self.names[label], probability)
            for label, probability in found
        ]


class Prompted(Labeller):
    """A language model that is asked for the label."""

    def __init__(self, settings: PredictSettings):
        names = load_label_names(settings.label_names)
        frame(settings.prompt_template, names)
        self.asking = asking = Asking(settings, names)
        model, tokenizer, device = asking.model, asking.tokenizer, asking.device
        super().__init__(settings.batch_size, names, model, tokenizer, device, causal=asking.causal)

    def rows(self, data: list[Example]) -> list[Example]:
        (rows,) = self.asking.rows(data)
        return rows


class Finetuned(Labeller):
    """A classifier that fine-tuning saved."""

    def __init__(self, settings: PredictSettings):
        self.classifier = load(settings, read_classifier(settings.load))
        super().__init__(
            settings.batch_size,
            self.classifier.config.label_names,
            self.classifier.model,
            self.classifier.tokenizer,
            self.classifier.device,
            causal=self.classifier.model.llama.config.causal,
            dtype=settings.dtype,
            with_lengths=self.classifier.model.reads_lengths,
        )

    def rows(self, data: list[Example]) -> list[Example]:
        classifier = self.classifier
        (inputs,) = methods.model_inputs(
            classifier.model, classifier.methods, classifier.tokenizer, data
        )
        return inputs


def predict(settings: PredictSettings) -> None:
    """Write a label for each line of the input, in order, as they are known."""
    distributed.require_one_process("predict")
    keep_freed_memory()
    with explain_out_of_memory("predicting", LESS_MEMORY):
        label_lines(settings)


def label_lines(settings: PredictSettings) -> None:
    """Write a label for each line of the input."""
    if settings.input is not None and not Path(settings.input).is_file():
        raise missing_file(settings.input)
    if settings.output is not None:
        reads = [settings.input, settings.load, settings.pretrained_model_path]
        reads += [settings.label_names, settings.tokenizer_path or TOKENIZER_MODEL]
        check_outputs([settings.output], [path for path in reads if path is not None])
        if settings.input is None and is_standard_input(settings.output):
            raise InputError(f"{settings.output}: would overwrite the input; name another file")
    label = Prompted(settings) if settings.load is None else Finetuned(settings)
    with contextlib.ExitStack() as stack:
        is_file = settings.input is not None
        file = settings.input if is_file else sys.stdin.fileno()
        source = stack.enter_context(open(file, "rb", buffering=0, closefd=is_file))
        target: IO[str] = sys.stdout
        if settings.output is not None:
            target = stack.enter_context(atomic_write(settings.output))
        write = WRITERS[settings.format](target)
        # Without a mask a label depends on the others of its batch, so batches are made whole.
        whole = not label.causal and not source.isatty()
        bar = stack.enter_context(
            Bar(desc="predict", unit=" lines", disable=settings.output is None)
        )
        n_lines = 0
        for lines in groups(lines_of(source), settings.batch_size, whole_batches=whole):
            sentences = decoded(lines, n_lines, settings.input or "standard input")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                labels = label(sentences)
            for warning in caught:
                place = f"lines {n_lines + 1} to {n_lines + len(lines)}"
                warnings.warn(f"{place}: {warning.message}", warning.category, stacklevel=2)
            for result in labels:
                write(result)
            n_lines += len(lines)
            bar.update(len(lines))


def is_standard_input(path: str) -> bool:
    """Whether standard input comes from this file."""
    return os.path.exists(path) and os.path.samestat(os.fstat(sys.stdin.fileno()), os.stat(path))


def lines_of(source: RawIOBase) -> Iterator[list[bytes]]:
    """The lines of a file that is not buffered: after each read those that are complete.

    Raises:
        InputError: it does not wait for what is not there yet.
    """
    rest = bytearray()
    while data := source.read(1 << 16):  # what is there, and only if nothing is, it waits
        *lines, last = data.split(b"\n")
        if lines:
            lines[0] = bytes(rest) + lines[0]
            rest.clear()
            yield lines
        rest += last
    if data is None:
        raise InputError("the input does not block; pass it through a pipe, as in `cat | …`")
    if rest:
        yield [bytes(rest)]


def groups(
    reads: Iterable[list[bytes]], batch_size: int, *, whole_batches: bool
) -> Iterator[list[bytes]]:
    """What is labelled at once: all that has come, at most `MOST_BATCHES`.

    Args:
        whole_batches: wait until a batch is full, if more may come.
    """
    most = MOST_BATCHES * batch_size
    some: list[bytes] = []
    for lines in reads:
        some += lines
        end = len(some) - (len(some) % batch_size if whole_batches else 0)
        for start in range(0, end, most):
            yield some[start : min(start + most, end)]
        some = some[end:]
    if some:
        yield some


def decoded(lines: list[bytes], n_before: int, name: str) -> list[str]:
    """Lines as text, without space at their ends.

    Raises:
        InputError: a line is no UTF-8.
    """
    texts = []
    for number, line in enumerate(lines, start=n_before + 1):
        try:
            texts.append(line.decode("utf-8-sig" if number == 1 else "utf-8").strip())
        except UnicodeDecodeError as error:
            raise InputError(f"{name}, line {number}: not UTF-8 text; save it as UTF-8") from error
    return texts


def text_writer(target: IO[str]) -> Callable[[Label], None]:
    def write(result: Label) -> None:
        label, name, probability = result
        print(label, "" if name is None else name, f"{probability:.4f}", sep="\t", file=target)

    return write


def jsonl_writer(target: IO[str]) -> Callable[[Label], None]:
    def write(result: Label) -> None:
        record = dict(zip(FIELDS, result, strict=True))
        print(json.dumps(record, ensure_ascii=False), file=target)

    return write


def csv_writer(target: IO[str]) -> Callable[[Label], None]:
    writer = csv.writer(target, lineterminator="\n")
    writer.writerow(FIELDS)
    return writer.writerow


WRITERS = {"text": text_writer, "jsonl": jsonl_writer, "csv": csv_writer}
