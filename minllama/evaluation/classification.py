"""Accuracy and F1 of a classifier, and the files of its predictions."""

import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader

from minllama.common.files import atomic_write
from minllama.common.flags import ClassifySettings
from minllama.common.progress import progress_bar
from minllama.evaluation.metrics import Records, append_metrics
from minllama.inference.sampling import check_scores
from minllama.text.batches import Batch, in_data_order
from minllama.text.labelled import UNLABELLED
from minllama.training import distributed
from utils import peak_memory, to_device


class Evaluation(NamedTuple):
    """The results of a classifier on a split; without labels, accuracy and F1 are NaN."""

    accuracy: float
    macro_f1: float
    predictions: list[int]
    labels: list[int]
    sentences: list[str]


@torch.inference_mode()
def model_eval(dataloader: DataLoader, model: nn.Module, device: torch.device | str) -> Evaluation:
    """Classify the examples of a loader; several processes share its batches.

    The results are in the order of the loader, or of the data if the loader sorts by length.

    Raises:
        InputError: the scores are not finite, as after a training run that diverged.
    """
    from sklearn.metrics import accuracy_score, f1_score  # takes a second to import

    model.eval()
    is_trained = any(parameter.requires_grad for parameter in model.parameters())
    remedy = "lower --lr, or take other weights" if is_trained else "take other weights"
    my_predictions: list[list[int]] = []
    labels: list[int] = []
    sentences: list[str] = []
    for batches, batch, is_counted in distributed.rounds(progress_bar(dataloader, desc="eval")):
        scores = model(*forward_inputs(as_batch(batch), device))  # (batch, num_labels)
        highest, guesses = scores.max(dim=-1)  # (batch,)
        check_scores(highest, remedy)
        if is_counted:
            my_predictions.append(guesses.tolist())
        for each in map(as_batch, batches):
            labels += each.labels.tolist()
            sentences += each.sents
    predictions = [label for batch in distributed.gather_rounds(my_predictions) for label in batch]
    predictions = in_data_order(predictions, dataloader)
    labels = in_data_order(labels, dataloader)
    sentences = in_data_order(sentences, dataloader)
    if set(labels) == {UNLABELLED}:
        return Evaluation(math.nan, math.nan, predictions, labels, sentences)
    accuracy = accuracy_score(labels, predictions)
    macro_f1 = f1_score(labels, predictions, average="macro")
    return Evaluation(accuracy, macro_f1, predictions, labels, sentences)


def as_batch(batch: Batch | dict[str, Any]) -> Batch:
    """Convert a batch of the assignment's `LlamaDataset`, which is a dict."""
    return Batch(**batch) if isinstance(batch, dict) else batch


def forward_inputs(batch: Batch, device: torch.device | str) -> list[torch.Tensor]:
    """The inputs of a classifier's forward: ids and, if the batch has them, lengths."""
    inputs = [batch.token_ids] if batch.lengths is None else [batch.token_ids, batch.lengths]
    return [to_device(tensor, device) for tensor in inputs]


def report_results(
    settings: ClassifySettings,
    loaders: dict[str, DataLoader],
    evaluate: Callable[[DataLoader], Evaluation],
    device: torch.device,
    label_names: Sequence[str],
) -> Records:
    """Evaluate dev and test, print the accuracies, and write predictions and metrics.

    Args:
        loaders: the batches of each split.

    Returns:
        the metrics of each split.
    """
    results: dict[str, Evaluation] = {}
    records: Records = []
    for split, loader in loaders.items():
        start = time.perf_counter()
        results[split] = evaluate(loader)
        seconds = time.perf_counter() - start
        record = {"option": settings.option, "split": split}
        records.append(record | metrics_of(results[split], seconds, device, label_names))
    distributed.on_rank0(lambda: write_results(settings, results, records))
    return records


def metrics_of(
    result: Evaluation, seconds: float, device: torch.device, label_names: Sequence[str]
) -> dict[str, Any]:
    """The metrics of a split as they are written to files."""
    metrics = {
        "seconds": seconds,
        "sentences_per_second": len(result.predictions) / seconds,
        "peak_memory_bytes": peak_memory(device),
    }
    if math.isnan(result.accuracy):
        return metrics
    counts = Counter(zip(result.labels, result.predictions, strict=True))
    numbers = range(len(label_names))
    return {
        "accuracy": result.accuracy,
        "macro_f1": result.macro_f1,
        **metrics,
        "labels": list(label_names),
        # A row for each true label, a column for each prediction.
        "confusion_matrix": [[counts[label, guess] for guess in numbers] for label in numbers],
    }


def write_results(
    settings: ClassifySettings, results: dict[str, Evaluation], records: Records
) -> None:
    """Print the accuracies, and with `report` more, and write predictions and metrics.

    Args:
        results: the evaluation of each split.
    """
    outfiles = {"dev": settings.dev_out, "test": settings.test_out}
    for split, result in results.items():
        accuracy, _, predictions, _, sentences = result
        write_predictions_to_file(split, outfiles[split], accuracy, predictions, sentences)
    for record in records:
        append_metrics(settings.metrics_out, **record)
    for record, result in zip(records, results.values(), strict=True):
        if settings.report and not math.isnan(result.accuracy):
            print_report(record, result, with_baseline=settings.option == "prompt")


def write_predictions_to_file(
    split: str, outfile: str | Path, acc: float, pred: list[int], sents: list[str]
) -> None:
    """Print the split's accuracy, and write a line `prediction ||| sentence` for each sentence.

    An accuracy of NaN, of a split without labels, is not printed. A line break in a sentence, which
    a prompt's template may have, is written as a space.
    """
    if math.isnan(acc):
        print(f"{split}: every label is {UNLABELLED}, so it has no accuracy", file=sys.stderr)
    else:
        print(f"{split} acc :: {acc:.3f}")
    lines = [re.sub(r"[\r\n]", " ", f"{p} ||| {s}") for p, s in zip(pred, sents, strict=True)]
    with atomic_write(outfile) as file:
        file.writelines(f"{line}\n" for line in lines)


def print_report(record: dict[str, Any], result: Evaluation, *, with_baseline: bool) -> None:
    """Print precision, recall and F1 of every label, and the confusion matrix of a split.

    Args:
        record: the split's metrics.
        with_baseline: print the accuracy of always predicting the most frequent label too.
    """
    from sklearn.metrics import classification_report

    split, names = record["split"], record["labels"]
    table = classification_report(
        result.labels,
        result.predictions,
        labels=range(len(names)),
        target_names=names,
        digits=3,
        zero_division=0,
    )
    print(f"\n{split}:\n{table}")
    print("confusion matrix (a row for each true label, a column for each prediction):")
    width = max(map(len, names))
    for name, row in zip(names, record["confusion_matrix"], strict=True):
        print(f"{name:>{width}}", *(f"{count:6d}" for count in row))
    if with_baseline:
        label, count = Counter(result.labels).most_common(1)[0]
        print(
            f"{split} acc :: {result.accuracy:.3f}, majority-class baseline ({names[label]}) :: "
            f"{count / len(result.labels):.3f}"
        )
