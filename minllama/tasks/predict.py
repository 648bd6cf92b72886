"""`--option predict`: label unlabelled sentences, line by line as they arrive."""

import contextlib
import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

import torch

from minllama.checkpoints.formats import find_tokenizer
from minllama.common.errors import InputError, explain_out_of_memory, missing_file
from minllama.common.files import atomic_write, check_outputs
from minllama.common.flags import DEMO_LABELS, DEMO_MODEL, LESS_MEMORY
from minllama.common.progress import progress_bar
from minllama.common.settings import flag
from minllama.evaluation.classification import forward_inputs
from minllama.inference.sampling import check_scores
from minllama.kernels.cpu import keep_freed_memory
from minllama.methods.classify import Classifier, load
from minllama.methods.settings import FinetuneSettings
from minllama.tasks.prompt import ZeroShotSettings, zero_shot_classifier
from minllama.text.batches import Example, in_data_order
from minllama.text.labelled import load_label_names
from minllama.text.lines import read_lines
from minllama.training import distributed
from minllama.training.precision import mixed_precision
from tokenizer import TOKENIZER_MODEL

FORMATS = ("text", "jsonl", "csv")
MAX_BATCHES = 100  # that are labelled together; for a causal model they are sorted by length


class Label(NamedTuple):
    """A predicted label: its number, its name if known, and its probability."""

    label: int
    name: str | None
    probability: float


@dataclass(frozen=True, kw_only=True)
class PredictSettings(ZeroShotSettings):
    """The flags of prediction."""

    title = "predict"

    load: str | None = flag(
        None,
        "a classifier that fine-tuning saved (default: prompting, which requires --label-names)",
        metavar="CHECKPOINT",
    )
    input: str | None = flag(None, "sentences, one per line (default: standard input)")
    output: str | None = flag(None, "file for the labels (default: standard output)")
    format: str = flag(
        "text",
        "label, name and probability between tabs, as JSON lines, or as CSV with a header",
        choices=FORMATS,
    )

    @classmethod
    def from_flags(cls, values: dict[str, Any]) -> Self:
        """Build the settings from flags; with `load`, missing flags take the saved run's values."""
        explicit = tuple(sorted(values))
        if values.get("load") is not None:
            for name in ("prompt_template", "calibrate"):
                if name in values:
                    raise InputError(f"--{name}: --load uses no prompt; leave one of them out")
            if values.get("dtype") == "int8":
                raise InputError("--dtype int8: --load computes in float32 or bfloat16")
            values = FinetuneSettings.from_saved_run(values)
        return cls(**cls.select_fields(values), explicit=explicit)

    def resolved(self) -> Self:
        settings = self if self.load is not None else self.with_demo(DEMO_MODEL, DEMO_LABELS)
        path = settings.tokenizer_path or find_tokenizer(settings.pretrained_model_path)
        return settings.replace(tokenizer_path=path)

    def check(self) -> None:
        """Check, before any work, that the input exists and the output overwrites nothing."""
        if self.input is not None and not Path(self.input).is_file():
            raise missing_file(self.input)
        if self.output is None:
            return
        reads = [
            self.input or "/dev/stdin",
            self.load,
            self.pretrained_model_path,
            self.label_names,
        ]
        reads.append(self.tokenizer_path or TOKENIZER_MODEL)
        check_outputs([self.output], [path for path in reads if path is not None])


def predict(settings: PredictSettings) -> None:
    """Write a label for each line of the input, in order, as soon as it is known."""
    distributed.require_one_process("predict")
    settings.check()
    keep_freed_memory()
    with explain_out_of_memory("predicting", LESS_MEMORY), contextlib.ExitStack() as stack:
        if settings.load is None:
            classifier = zero_shot_classifier(settings, load_label_names(settings.label_names))
        else:
            classifier = load(settings, settings.load)
        path = sys.stdin.fileno() if settings.input is None else settings.input
        source = stack.enter_context(open(path, "rb", buffering=0, closefd=path == settings.input))
        target: IO[str] = sys.stdout
        if settings.output is not None:
            target = stack.enter_context(atomic_write(settings.output))
        bar = stack.enter_context(
            progress_bar(desc="predict", unit=" lines", disable=target is sys.stdout)
        )
        write = make_writer(settings.format, target)
        # Without a mask a label depends on the others of its batch, so batches have to be full.
        full_batches = not classifier.model.llama.config.causal and not source.isatty()
        arrived = read_lines(source, settings.input or "standard input")
        for lines in groups(arrived, settings.batch_size, full_batches=full_batches):
            for label in label_sentences(classifier, lines, settings.batch_size):
                write(label)
            bar.update(len(lines))


@torch.inference_mode()
def label_sentences(classifier: Classifier, lines: list[str], batch_size: int) -> list[Label]:
    """Label sentences, in their order."""
    (examples,) = classifier.tokenize([Example(line.strip(), 0) for line in lines])
    loader = classifier.loader(examples, batch_size)
    classifier.model.eval()
    batch_scores = []
    with mixed_precision(classifier.device, classifier.dtype):
        for batch in loader:
            scores = classifier.model(*forward_inputs(batch, classifier.device))
            batch_scores.append(scores.float())  # (batch, num_labels)
    probabilities, labels = torch.cat(batch_scores).softmax(dim=-1).max(dim=-1)
    check_scores(probabilities)
    names = classifier.config.label_names
    results = [
        Label(label, None if names is None else names[label], probability)
        for label, probability in zip(labels.tolist(), probabilities.tolist(), strict=True)
    ]
    return in_data_order(results, loader)


def groups(
    arrived: Iterable[list[str]], batch_size: int, *, full_batches: bool
) -> Iterator[list[str]]:
    """Group the lines that have arrived: at most `MAX_BATCHES` batches, full ones if required."""
    size = MAX_BATCHES * batch_size
    waiting: list[str] = []
    for lines in arrived:
        waiting += lines
        end = len(waiting) - (len(waiting) % batch_size if full_batches else 0)
        for start in range(0, end, size):
            yield waiting[start : min(start + size, end)]
        waiting = waiting[end:]
    if waiting:
        yield waiting


def make_writer(format: str, target: IO[str]) -> Callable[[Label], None]:
    """A function that writes a label in one of `FORMATS`; for CSV it begins with the header."""
    if format == "csv":
        writer = csv.writer(target, lineterminator="\n")
        writer.writerow(Label._fields)
        return writer.writerow

    def write(label: Label) -> None:
        if format == "jsonl":
            print(json.dumps(label._asdict(), ensure_ascii=False), file=target)
        else:
            number, name, probability = label
            print(number, name or "", f"{probability:.4f}", sep="\t", file=target)

    return write
