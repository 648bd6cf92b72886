"""How good a classifier is, and the file of its predictions."""

import json
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from minllama.common.errors import InputError
from minllama.common.files import atomic_write, name_file_in_errors
from minllama.common.flags import ClassifySettings
from minllama.common.progress import Bar
from minllama.text.batches import Batch, SortedBatchSampler
from minllama.training import distributed
from utils import peak_memory, to_device


class Evaluation(NamedTuple):
    """The result of classifying some sentences."""

    accuracy: float
    macro_f1: float
    predictions: list[int]
    labels: list[int]
    sentences: list[str]


@torch.inference_mode()
def model_eval(dataloader: DataLoader, model: nn.Module, device: torch.device) -> Evaluation:
    """Classify everything that a loader of `LlamaDataset` batches gives.

    The results are in the loader's order; if that was sorted by length, in the data's.

    Returns:
        accuracy, macro-averaged F1, predicted labels, true labels, sentences.

    Raises:
        InputError: the model gives no numbers, as one whose training has diverged.
    """
    from sklearn.metrics import accuracy_score, f1_score  # takes a second to import

    model.eval()
    mine, y_true, sents = [], [], []
    progress = Bar(dataloader, desc="eval")
    for batches, batch, counts in distributed.rounds(progress):
        scores = model(*inputs_of(as_batch(batch), device))
        if scores.isnan().any():
            raise InputError("the model's scores are not finite; lower --lr")
        if counts:
            mine.append(scores.argmax(dim=-1).tolist())
        for each in map(as_batch, batches):
            y_true += each.labels.tolist()
            sents += each.sents
    y_pred = [label for labels in distributed.gather_rounds(mine) for label in labels]
    if isinstance(dataloader.batch_sampler, SortedBatchSampler):
        unsort = dataloader.batch_sampler.unsort
        y_pred, y_true, sents = unsort(y_pred), unsort(y_true), unsort(sents)
    f1 = f1_score(y_true, y_pred, average="macro")
    return Evaluation(accuracy_score(y_true, y_pred), f1, y_pred, y_true, sents)


def report_results(
    settings: ClassifySettings,
    loaders: dict[str, DataLoader],
    evaluate: Callable[[DataLoader], tuple],
    device: torch.device,
    labels: Sequence[str],
) -> list[dict[str, Any]]:
    """Evaluate dev and test, print their accuracies, write the predictions, and what is asked for.

    Args:
        settings: with `report` the scores of every class and the confusion matrix are printed, with
            `metrics_out` a line of JSON for each split is appended.
        loaders: by split.
        evaluate: returns what `model_eval` does.
        labels: their names.

    Returns:
        those lines, whether they are wanted or not; in other processes than the first nothing.
    """
    results, seconds = {}, {}
    for split, loader in loaders.items():
        start = time.perf_counter()
        results[split] = evaluate(loader)
        seconds[split] = time.perf_counter() - start
    records: list[dict[str, Any]] = []
    distributed.on_rank0(
        lambda: records.extend(write_results(settings, results, seconds, device, labels))
    )
    return records


def write_results(
    settings: ClassifySettings,
    results: dict[str, tuple],
    seconds: dict[str, float],
    device: torch.device,
    labels: Sequence[str],
) -> list[dict[str, Any]]:
    """Write and print what `report_results` is to give, and return the lines of metrics.

    Args:
        results, seconds: by split, what was found and how long it took.
    """
    for split, (accuracy, _, y_pred, _, sents) in results.items():
        write_predictions_to_file(split, getattr(settings, f"{split}_out"), accuracy, y_pred, sents)
    from sklearn.metrics import confusion_matrix

    records = []
    for split, (accuracy, f1, y_pred, y_true, _) in results.items():
        matrix = confusion_matrix(y_true, y_pred, labels=range(len(labels)))
        if settings.report:
            print_report(split, y_true, y_pred, labels, matrix)
            if settings.option == "prompt":
                print_most_frequent(split, accuracy, y_true, labels)
        record = {
            "option": settings.option,
            "split": split,
            "accuracy": accuracy,
            "macro_f1": f1,
            "seconds": seconds[split],
            "sentences_per_second": len(y_pred) / seconds[split],
            "peak_memory_bytes": peak_memory(device),
            "labels": list(labels),
            "confusion_matrix": matrix.tolist(),  # a row for each true label
        }
        append_metrics(settings.metrics_out, **record)
        records.append(record)
    return records


def print_report(
    split: str, y_true: list[int], y_pred: list[int], labels: Sequence[str], matrix: np.ndarray
) -> None:
    """Precision, recall and F1 of every class, and the confusion matrix."""
    from sklearn.metrics import classification_report

    numbers = range(len(labels))
    print(f"\n{split}:")
    print(
        classification_report(
            y_true, y_pred, labels=numbers, target_names=labels, digits=3, zero_division=0
        )
    )
    print("confusion matrix (a row for each true label, a column for each prediction):")
    width = max(map(len, labels))
    for label, row in zip(labels, matrix, strict=True):
        print(f"{label:>{width}}", *(f"{count:6d}" for count in row))


def print_most_frequent(
    split: str, accuracy: float, y_true: list[int], labels: Sequence[str]
) -> None:
    """What an accuracy has to be compared with."""
    label, count = Counter(y_true).most_common(1)[0]
    share = count / len(y_true)
    print(f"{split} acc :: {accuracy:.3f}, always answering {labels[label]} gives {share:.3f}")


def append_metrics(path: str | Path | None, **record: Any) -> None:
    """Add a line of JSON to a file, if one is wanted; where that fails the line is lost."""
    if path is None:
        return
    try:
        with name_file_in_errors(path), Path(path).open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(record)}\n")
    except OSError as error:
        warnings.warn(f"{path}: {error.strerror}; a line of metrics is lost", stacklevel=2)


def check_metrics_file(path: str | Path | None) -> None:
    """See, before any work, that lines of JSON can be added to a file, if one is wanted.

    Raises:
        InputError: they cannot, or what is there is something else.
    """
    if path is None or not Path(path).is_file():
        return
    path = Path(path)
    if not os.access(path, os.W_OK):
        raise InputError(f"{path}: not writable")
    *_, last = path.read_bytes().splitlines(keepends=True) or [b"{}\n"]
    try:
        good = last.endswith(b"\n") and isinstance(json.loads(last), dict)
    except ValueError:
        good = False
    if not good:
        raise InputError(f"{path}: not a file of JSON lines to add to; name another one")


def as_batch(batch: Batch | dict[str, Any]) -> Batch:
    """Convert a batch of the assignment's `LlamaDataset`, which is a dict."""
    return Batch(**batch) if isinstance(batch, dict) else batch


def inputs_of(batch: Batch, device: torch.device) -> list[torch.Tensor]:
    """The inputs of a classifier's forward: ids and, where the batch has them, lengths."""
    inputs = [batch.token_ids] if batch.lengths is None else [batch.token_ids, batch.lengths]
    return [to_device(tensor, device) for tensor in inputs]


def write_predictions_to_file(
    split: str, outfile: str | Path, acc: float, pred: list[int], sents: list[str]
) -> None:
    """Print the split's accuracy and write a line `prediction ||| sentence` for each sentence."""
    print(f"{split} acc :: {acc:.3f}")
    with atomic_write(outfile) as file:
        file.writelines(f"{p} ||| {s}\n" for p, s in zip(pred, sents, strict=True))
