"""`--option finetune`: train a classifier, keep its best epoch, and evaluate that."""

import argparse
import math
import random
from pathlib import Path
from types import SimpleNamespace
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
    LlamaDataset,
    check_labels,
    create_data,
    fit_context,
    load_label_names,
    read_labelled,
)
from evaluation import check_out_files, inputs_of, model_eval, write_predictions_to_file
from optimizer import AdamW
from tokenizer import Tokenizer, check_vocabulary
from utils import InputError, check_writable, pick_device


def train(args: argparse.Namespace) -> None:
    """Fine-tune on `args.train`; save to `args.filepath` at each new best accuracy on `args.dev`.

    After every epoch the train loss (mean over batches) and the accuracies on train and dev are
    printed. `args.test` is only checked, so that a mistake in it shows before the training.
    """
    check_out_files(args, "finetuning")
    check_writable(args.filepath)
    num_labels = count_labels(args)
    for filename in (args.train, args.dev, args.test):
        check_labels(filename, num_labels)
    device = pick_device(args.use_gpu)
    tokenizer = Tokenizer(args.max_sentence_len, getattr(args, "tokenizer_path", None))
    train_data, _ = create_data(args.train, tokenizer, "train", eos=False)
    dev_data = create_data(args.dev, tokenizer, "valid", eos=False)

    config = SimpleNamespace(
        hidden_dropout_prob=args.hidden_dropout_prob,
        pretrained_model_path=args.pretrained_model_path,
        num_labels=num_labels,
        option=args.option,
        causal=getattr(args, "causal", None),
    )
    model = LlamaEmbeddingClassifier(config).to(device)
    check_vocabulary(tokenizer, model.llama.vocab_size, args.pretrained_model_path)
    train_loader, dev_loader = make_loaders(model, args, train_data, dev_data, shuffle_first=True)
    optimizer = AdamW(model.parameters(), lr=args.lr)

    best_dev_acc = -1.0
    for epoch in range(args.epochs):
        train_loss = train_epoch(model, train_loader, optimizer, args.batch_size, device, epoch)
        train_acc, *_ = model_eval(train_loader, model, device)
        dev_acc, *_ = model_eval(dev_loader, model, device)
        if dev_acc > best_dev_acc:
            best_dev_acc = dev_acc
            save_model(model, optimizer, args, config, args.filepath)
        print(
            f"epoch {epoch}: train loss :: {train_loss:.3f}, "
            f"train acc :: {train_acc:.3f}, dev acc :: {dev_acc:.3f}"
        )


def count_labels(args: argparse.Namespace) -> int:
    """The length of the label mapping if one was given, else the number of labels in train."""
    if "label_names" in getattr(args, "given", ()):
        return len(load_label_names(args.label_names))
    return len({label for label, _ in read_labelled(args.train)})


def make_loaders(
    model: LlamaEmbeddingClassifier,
    args: argparse.Namespace,
    *splits: list,
    shuffle_first: bool = False,
) -> list[DataLoader]:
    """Fit the rows of each split to the model's context and batch them; maybe shuffle the first."""
    config = model.llama.config
    loaders = []
    for data in fit_context(*splits, max_len=config.max_seq_len, keep="first"):
        dataset = LlamaDataset(data, args, with_lengths=config.causal)
        loaders.append(
            DataLoader(
                dataset,
                shuffle=shuffle_first and not loaders,
                batch_size=args.batch_size,
                collate_fn=dataset.collate_fn,
            )
        )
    return loaders


def train_epoch(
    model: nn.Module,
    loader: DataLoader,
    optimizer: Optimizer,
    batch_size: int,
    device: torch.device,
    epoch: int,
) -> float:
    """One pass over the loader; returns the mean loss of its batches.

    Raises:
        InputError: the loss is not finite; the weights are left as they were before that step.
    """
    model.train()
    total = 0.0
    for step, batch in enumerate(tqdm(loader, desc=f"train-{epoch}", leave=False, disable=None)):
        log_probs = model(*inputs_of(batch, device))
        loss = F.nll_loss(log_probs, batch["labels"].to(device), reduction="sum") / batch_size
        total += loss.item()
        if not math.isfinite(total):
            raise InputError(f"the loss is {loss.item()} in epoch {epoch}, step {step}; lower --lr")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return total / len(loader)


def save_model(
    model: nn.Module, optimizer: Optimizer, args: Any, config: Any, filepath: str | Path
) -> None:
    """Save weights, optimizer, settings and generator states, as tensors and plain values."""
    kind, keys, *rest = np.random.get_state()
    saved = {
        "model": model.state_dict(),
        "optim": optimizer.state_dict(),
        "args": {name: value for name, value in vars(args).items() if name != "given"},
        "model_config": vars(config),
        "system_rng": random.getstate(),
        "numpy_rng": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch_rng": torch.random.get_rng_state(),
    }
    write_checkpoint(saved, filepath)
    print(f"save the model to {filepath}")


def test(args: argparse.Namespace) -> None:
    """Load `args.filepath`, evaluate on dev and test, and write the predictions."""
    check_out_files(args, "finetuning")
    device = pick_device(args.use_gpu)
    saved = read_checkpoint(args.filepath)
    config = SimpleNamespace(**saved["model_config"])
    model = LlamaEmbeddingClassifier(config)
    model.load_state_dict(saved["model"])
    model = model.to(device)
    print(f"load model from {args.filepath}")
    tokenizer = Tokenizer(args.max_sentence_len, getattr(args, "tokenizer_path", None))
    dev_data = create_data(args.dev, tokenizer, "valid", eos=False)
    test_data = create_data(args.test, tokenizer, "test", eos=False)
    dev_loader, test_loader = make_loaders(model, args, dev_data, test_data)
    dev_acc, _, dev_pred, _, dev_sents = model_eval(dev_loader, model, device)
    test_acc, _, test_pred, _, test_sents = model_eval(test_loader, model, device)
    write_predictions_to_file("dev", args.dev_out, dev_acc, dev_pred, dev_sents)
    write_predictions_to_file("test", args.test_out, test_acc, test_pred, test_sents)


test.__test__ = False  # not a test of pytest's, whatever its name
