"""`--option finetune`: train a classifier, keep its best epoch, and evaluate that."""

import argparse
import functools
import random
import warnings
from pathlib import Path
from types import NoneType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from tqdm import tqdm

from base_llama import read_checkpoint, write_checkpoint
from classifier import LlamaEmbeddingClassifier
from dataset import (
    EncodedDataset,
    Example,
    check_labels,
    create_data,
    encode_labelled,
    fit_context,
    load_label_names,
    read_labelled,
)
from evaluation import check_out_files, inputs_of, model_eval, write_predictions_to_file
from optimizer import AdamW
from tokenizer import Tokenizer, check_vocabulary
from training import Loss, update
from utils import pick_device


def train(args: argparse.Namespace) -> None:
    """Fine-tune on `args.train`; save to `args.filepath` at each new best accuracy on `args.dev`.

    After every epoch the train loss (mean over batches) and the accuracies on train and dev are
    printed. `args.test` is only checked, so that a mistake in it shows before the training.
    """
    num_labels, known_from = count_labels(args)
    for filename in (args.train, args.dev, args.test):
        check_labels(filename, num_labels, known_from)
    device = pick_device(args.use_gpu)
    tokenizer = Tokenizer(args.max_sentence_len, getattr(args, "tokenizer_path", None))
    config = SimpleNamespace(
        hidden_dropout_prob=args.hidden_dropout_prob,
        pretrained_model_path=str(args.pretrained_model_path),
        num_labels=num_labels,
        option=args.option,
        causal=getattr(args, "causal", None),
    )
    model = LlamaEmbeddingClassifier(config).to(device)
    check_vocabulary(tokenizer, model.llama.vocab_size, args.pretrained_model_path)

    train_data, _ = create_data(args.train, tokenizer, "train", eos=False)
    dev_data = create_data(args.dev, tokenizer, "valid", eos=False)
    test_data = encode_labelled(args.test, tokenizer)  # counted among the rows that do not fit
    train_data, dev_data, _ = fit_sentences(model, train_data, dev_data, test_data)
    train_loader = make_loader(train_data, model, args, shuffle=True)
    dev_loader = make_loader(dev_data, model, args)
    optimizer = AdamW(model.parameters(), lr=float(args.lr))
    loss = functools.partial(classification_loss, batch_size=args.batch_size)

    best_dev_acc = -1.0
    for epoch in range(args.epochs):
        train_loss = train_epoch(model, train_loader, optimizer, loss, epoch)
        train_acc, *_ = model_eval(train_loader, model, device)
        dev_acc, *_ = model_eval(dev_loader, model, device)
        if dev_acc > best_dev_acc:
            best_dev_acc = dev_acc
            save_model(model, optimizer, args, config, args.filepath)
        print(
            f"epoch {epoch}: train loss :: {train_loss:.3f}, "
            f"train acc :: {train_acc:.3f}, dev acc :: {dev_acc:.3f}"
        )


def count_labels(args: argparse.Namespace) -> tuple[int, str]:
    """The number of labels and the file that tells it: the label mapping if given, else train."""
    if "label_names" in getattr(args, "given", ()):
        return len(load_label_names(args.label_names)), args.label_names
    return len({label for label, _ in read_labelled(args.train)}), args.train


def fit_sentences(model: LlamaEmbeddingClassifier, *splits: list[Example]) -> list[list[Example]]:
    return fit_context(*splits, max_len=model.llama.config.max_seq_len, keep="first")


def make_loader(
    data: list[Example],
    model: LlamaEmbeddingClassifier,
    args: argparse.Namespace,
    shuffle: bool = False,
) -> DataLoader:
    dataset = EncodedDataset(data, args, with_lengths=model.llama.config.causal)
    return DataLoader(
        dataset, shuffle=shuffle, batch_size=args.batch_size, collate_fn=dataset.collate_fn
    )


def classification_loss(batch: dict, model: nn.Module, batch_size: int) -> torch.Tensor:
    """Negative log-likelihood of the labels, summed and divided by the nominal batch size."""
    device = next(model.parameters()).device
    log_probs = model(*inputs_of(batch, device))
    return F.nll_loss(log_probs, batch["labels"].to(device), reduction="sum") / batch_size


def train_epoch(
    model: nn.Module, loader: DataLoader, optimizer: Optimizer, loss: Loss, epoch: int
) -> float:
    """One pass over the loader; returns the mean loss of its batches.

    Raises:
        InputError: the loss is not finite; the weights are left as they were before that step.
    """
    model.train()
    total = 0.0
    for step, batch in enumerate(tqdm(loader, desc=f"train-{epoch}", leave=False, disable=None)):
        total += update(model, [batch], loss, optimizer, f"epoch {epoch}, step {step}")
    return total / len(loader)


def save_model(
    model: nn.Module, optimizer: Optimizer, args: Any, config: Any, filepath: str | Path
) -> None:
    """Save weights, optimizer, settings and generator states, as tensors and plain values."""
    kind, keys, *rest = np.random.get_state()
    saved = {
        "model": model.state_dict(),
        "optim": optimizer.state_dict(),
        "args": {name: plain(value) for name, value in vars(args).items()},
        "model_config": {name: plain(value) for name, value in vars(config).items()},
        "system_rng": random.getstate(),
        "numpy_rng": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch_rng": torch.random.get_rng_state(),
    }
    write_checkpoint(saved, filepath)
    print(f"save the model to {filepath}")


def plain(value: Any) -> Any:
    """A value that can be saved without pickling a class; what is none becomes its text."""
    if isinstance(value, np.generic):
        value = value.item()
    return value if type(value) in (bool, int, float, str, list, NoneType) else str(value)


def test(args: argparse.Namespace) -> None:
    """Load `args.filepath`, evaluate on dev and test, and write the predictions."""
    check_out_files(args, "finetuning")
    device = pick_device(args.use_gpu)
    saved = read_checkpoint(args.filepath)
    config = SimpleNamespace(**saved["model_config"])
    tokenizer = Tokenizer(args.max_sentence_len, getattr(args, "tokenizer_path", None))
    model = LlamaEmbeddingClassifier(config)
    model.load_state_dict(saved["model"])
    model = model.to(device)
    print(f"load model from {args.filepath}")
    dev_data = create_data(args.dev, tokenizer, "valid", eos=False)
    test_data = create_data(args.test, tokenizer, "test", eos=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # training warned of the rows that are cut
        dev_data, test_data = fit_sentences(model, dev_data, test_data)
    dev_acc, _, dev_pred, _, dev_sents = model_eval(
        make_loader(dev_data, model, args), model, device
    )
    test_acc, _, test_pred, _, test_sents = model_eval(
        make_loader(test_data, model, args), model, device
    )
    write_predictions_to_file("dev", args.dev_out, dev_acc, dev_pred, dev_sents)
    write_predictions_to_file("test", args.test_out, test_acc, test_pred, test_sents)


test.__test__ = False  # not a test of pytest's, whatever its name
