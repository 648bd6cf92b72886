"""How good a classifier is, and the file of its predictions."""

import argparse
from pathlib import Path

import torch
from sklearn.metrics import accuracy_score, f1_score
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from utils import InputError, atomic_write, check_outputs


@torch.inference_mode()
def model_eval(
    dataloader: DataLoader, model: nn.Module, device: torch.device
) -> tuple[float, float, list[int], list[int], list[str]]:
    """Classify everything that a loader of `LlamaDataset` batches gives, in its order.

    Returns:
        accuracy, macro-averaged F1, predicted labels, true labels, sentences.
    """
    model.eval()
    y_pred, y_true, sents = [], [], []
    for batch in tqdm(dataloader, desc="eval", leave=False, disable=None):
        scores = model(*inputs_of(batch, device))
        y_pred += scores.argmax(dim=-1).tolist()
        y_true += batch["labels"].tolist()
        sents += batch["sents"]
    f1 = f1_score(y_true, y_pred, average="macro")
    return accuracy_score(y_true, y_pred), f1, y_pred, y_true, sents


def inputs_of(batch: dict, device: torch.device) -> list[torch.Tensor]:
    """What a batch holds for a classifier's forward: ids and, in causal mode, lengths."""
    return [batch[key].to(device) for key in ("token_ids", "lengths") if key in batch]


def write_predictions_to_file(
    split: str, outfile: str | Path, acc: float, pred: list[int], sents: list[str]
) -> None:
    """Print the split's accuracy and write a line `prediction ||| sentence` for each sentence."""
    print(f"{split} acc :: {acc:.3f}")
    with atomic_write(outfile) as file:
        file.writelines(f"{p} ||| {s}\n" for p, s in zip(pred, sents, strict=True))


def check_out_files(args: argparse.Namespace, kind: str, *outputs: str) -> None:
    """See, before any work, that all results can be written where they are wanted.

    Args:
        args: the command line's.
        kind: "prompting" or "finetuning".
        outputs: what is written besides the predictions.

    Raises:
        InputError: a name does not end as the assignment has it, or no file can be written there.
    """
    for split in ("dev", "test"):
        outfile = getattr(args, f"{split}_out")
        ending = f"{split}-{kind}-output.txt"
        if not str(outfile).endswith(ending):
            raise InputError(
                f"--{split}_out {outfile}: the name must end in {ending}, as in sst-{ending}"
            )
    inputs = [args.train, args.dev, args.test, args.label_names, args.pretrained_model_path]
    check_outputs([args.dev_out, args.test_out, *outputs], inputs)
