"""`--option predict`: label sentences that nobody has labelled, as they come."""

import argparse
import contextlib
import csv
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar, Self

import torch
from torch import nn

import methods
from common.errors import InputError, missing_file
from common.files import atomic_write, check_outputs
from common.settings import flag
from tasks.evaluation import inputs_of
from tasks.finetune import FinetuneSettings, load_classifier, same_label_names
from tasks.prompt import Asking, AskingSettings
from tasks.saving import read_saved
from tasks.settings import DEMO_MODEL
from text.labelled import Example, SortedBatchSampler, load_label_names, make_loader
from text.prompts import frame
from tokenizer import TOKENIZER_MODEL, Tokenizer
from training.step import mixed_precision
from utils import pick_device

FIELDS = ("label", "name", "probability")
MOST_BATCHES = 100  # that are formed together, of sentences of about the same length

Label = tuple[int, str | None, float]  # number, name, probability


@dataclass(frozen=True, kw_only=True)
class PredictSettings(AskingSettings):
    """Which sentences are labelled, by what, and where the labels go."""

    title = "predict"
    description = None
    demo = (DEMO_MODEL, {"label_names": "reviews-label-mapping.json"})
    shows_args: ClassVar[bool] = False

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
    def with_implied(cls, given: dict[str, Any]) -> dict[str, Any]:
        """With `load` the settings of the saved run, as far as they are known here."""
        if given.get("load") is None:
            return given
        for name in ("prompt_template", "calibrate"):
            if name in given:
                raise InputError(f"--{name}: --load does not ask for labels; leave one of them out")
        return cls.known(FinetuneSettings.with_implied(given)) | given

    def completed(self) -> Self:
        return self.with_tokenizer() if self.load is not None else super().completed()

    @property
    def checkpoints(self) -> list[str]:
        return [self.pretrained_model_path, *([] if self.load is None else [self.load])]


class Labeller:
    """A classifier, trained or asked, with what it makes of sentences.

    Attributes:
        rows: of sentences with their ids, the ids that the model reads.
    """

    def __init__(self, settings: PredictSettings):
        self.settings = settings
        self.names: list[str] | None = None
        self.rows: Callable[[list[Example]], list[list[Example]]]
        self.model: nn.Module
        if settings.load is None:
            self._ask()
        else:
            self._load()

    def _ask(self) -> None:
        settings = self.settings
        self.names = load_label_names(settings.label_names)
        frame(settings.prompt_template, self.names)
        asking = Asking(settings, self.names)
        self.model, self.device, self.rows = asking.model.eval(), asking.device, asking.rows
        self.tokenizer, self.causal, self.with_lengths = asking.tokenizer, asking.causal, False
        self.dtype = "float32"  # where it is another, the weights are packed in it

    def _load(self) -> None:
        settings = self.settings
        saved = read_saved(settings.load, FinetuneSettings)
        config = saved.config.replace(
            init_weights=False, pretrained_model_path=settings.pretrained_model_path
        )
        if "label_names" in settings.given:
            config = config.replace(label_names=same_label_names(settings, config))
        self.names = config.label_names
        self.device, self.dtype = pick_device(settings.use_gpu), settings.dtype
        self.tokenizer = Tokenizer(settings.max_sentence_len, settings.tokenizer_path)
        self.model = load_classifier(saved, config, self.tokenizer).to(self.device).eval()
        self.causal, self.with_lengths = self.model.llama.config.causal, self.model.reads_lengths
        self.rows = lambda data: methods.rows_for(self.model, saved.methods, self.tokenizer, data)

    @torch.inference_mode()
    def __call__(self, sentences: list[str]) -> Iterator[Label]:
        """The labels of some sentences, in their order."""
        data = [
            (sentence, 0, self.tokenizer.encode(sentence, bos=True, eos=False))
            for sentence in sentences
        ]
        (rows,) = self.rows(data)
        loader = make_loader(
            rows,
            self.settings.batch_size,
            self.tokenizer.pad_id,
            causal=self.causal,
            with_lengths=self.with_lengths,
        )
        scores = []
        with mixed_precision(self.device, self.dtype):
            for batch in loader:
                scores.append(self.model(*inputs_of(batch, self.device)).float())
        probabilities, labels = torch.cat(scores).softmax(dim=-1).max(dim=-1)
        if probabilities.isnan().any():
            raise InputError("the model's scores are not finite; it cannot be used")
        found = list(zip(labels.tolist(), probabilities.tolist(), strict=True))
        if isinstance(loader.batch_sampler, SortedBatchSampler):
            ordered = sorted(zip(loader.batch_sampler.order, found, strict=True))
            found = [result for _, result in ordered]
        for label, probability in found:
            yield label, None if self.names is None else self.names[label], probability


def predict(args: argparse.Namespace) -> None:
    """Write a label for each line of the input, in order, as they are known."""
    settings = PredictSettings.from_args(args)
    if settings.input is not None and not Path(settings.input).is_file():
        raise missing_file(settings.input)
    if settings.output is not None:
        reads = [settings.input, settings.load, settings.pretrained_model_path]
        reads += [settings.label_names, settings.tokenizer_path or TOKENIZER_MODEL]
        check_outputs([settings.output], [path for path in reads if path is not None])
    label = Labeller(settings)
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        source = sys.stdin.buffer
        if settings.input is not None:
            source = stack.enter_context(open(settings.input, "rb"))
        target: IO[str] = sys.stdout
        if settings.output is not None:
            target = stack.enter_context(atomic_write(settings.output))
        write = WRITERS[settings.format](target)
        sentences = read_sentences(source, settings.input or "standard input")
        for some in groups(sentences, settings.batch_size, is_typed=source.isatty()):
            for result in label(some):
                write(result)
            warnings.simplefilter("ignore")  # of rows that are cut it was said once
            if settings.output is None:
                target.flush()


def read_sentences(source: Iterable[bytes], name: str) -> Iterator[str]:
    """The lines of a file, without space at their ends.

    Raises:
        InputError: a line is no UTF-8.
    """
    for number, line in enumerate(source, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise InputError(f"{name}, line {number}: not UTF-8 text; save it as UTF-8") from error


def groups(sentences: Iterator[str], batch_size: int, *, is_typed: bool) -> Iterator[list[str]]:
    """What is labelled at once: a line where they are typed; else soon little, and then more."""
    size = 1 if is_typed else batch_size
    some: list[str] = []
    for sentence in sentences:
        some.append(sentence)
        if len(some) == size:
            yield some
            some = []
            if not is_typed:
                size = min(2 * size, MOST_BATCHES * batch_size)
    if some:
        yield some


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
