"""`--option finetune`: train a classifier, keep its best epoch, and evaluate that."""

import argparse
import functools
import itertools
import random
import time
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
from batching import make_loader
from classifier import LlamaEmbeddingClassifier
from dataset import (
    Example,
    check_labels,
    create_data,
    encode_labelled,
    fit_context,
    load_label_names,
    read_labelled,
)
from evaluation import (
    append_metrics,
    check_out_files,
    inputs_of,
    model_eval,
    report_results,
)
from optimizer import AdamW
from tokenizer import Tokenizer, check_vocabulary
from training import Loss, checkpoint_activations, mixed_precision, update
from utils import peak_memory, pick_device, with_defaults


def train(args: argparse.Namespace) -> None:
    """Fine-tune on `args.train`; save to `args.filepath` at each new best accuracy on `args.dev`.

    After every epoch the train loss (mean over batches) and the accuracies on train and dev are
    printed. `args.test` is only checked, so that a mistake in it shows before the training.
    """
    args = with_defaults(args)
    num_labels, known_from = count_labels(args)
    for filename in (args.train, args.dev, args.test):
        check_labels(filename, num_labels, known_from)
    device = pick_device(args.use_gpu)
    tokenizer = Tokenizer(args.max_sentence_len, args.tokenizer_path)
    config = SimpleNamespace(
        hidden_dropout_prob=args.hidden_dropout_prob,
        pretrained_model_path=str(args.pretrained_model_path),
        num_labels=num_labels,
        option=args.option,
        causal=args.causal,
    )
    model = LlamaEmbeddingClassifier(config).to(device)
    if args.activation_checkpointing:
        checkpoint_activations(model.llama.layers)
    check_vocabulary(tokenizer, model.llama.vocab_size, args.pretrained_model_path)

    train_data, _ = create_data(args.train, tokenizer, "train", eos=False)
    dev_data = create_data(args.dev, tokenizer, "valid", eos=False)
    test_data = encode_labelled(args.test, tokenizer)  # counted among the rows that do not fit
    train_data, dev_data, _ = fit_sentences(model, train_data, dev_data, test_data)
    causal = model.llama.config.causal
    train_loader = make_loader(train_data, args, causal=causal, shuffle=True)
    # The assignment evaluates train in another shuffled order, which draws random numbers.
    train_eval_loader = make_loader(train_data, args, causal=causal) if causal else train_loader
    dev_loader = make_loader(dev_data, args, causal=causal)
    optimizer = AdamW(model.parameters(), lr=float(args.lr))
    loss = functools.partial(classification_loss, batch_size=args.batch_size, dtype=args.dtype)

    best_dev_acc = -1.0
    for epoch in range(args.epochs):
        start = time.perf_counter()
        train_loss = train_epoch(model, train_loader, optimizer, loss, epoch, args.grad_accum)
        train_seconds = time.perf_counter() - start
        with mixed_precision(device, args.dtype):
            train_acc, train_f1, *_ = model_eval(train_eval_loader, model, device)
            dev_acc, dev_f1, *_ = model_eval(dev_loader, model, device)
        if dev_acc > best_dev_acc:
            best_dev_acc = dev_acc
            save_model(model, optimizer, args, config, args.filepath)
        print(
            f"epoch {epoch}: train loss :: {train_loss:.3f}, "
            f"train acc :: {train_acc:.3f}, dev acc :: {dev_acc:.3f}"
        )
        append_metrics(
            args.metrics_out,
            option="finetune",
            epoch=epoch,
            train_loss=train_loss,
            train_accuracy=train_acc,
            train_macro_f1=train_f1,
            dev_accuracy=dev_acc,
            dev_macro_f1=dev_f1,
            train_seconds=train_seconds,
            train_sentences_per_second=len(train_data) / train_seconds,
            seconds=time.perf_counter() - start,
            peak_memory_bytes=peak_memory(device),
        )


def count_labels(args: argparse.Namespace) -> tuple[int, str]:
    """The number of labels and the file that tells it: the label mapping if given, else train."""
    if "label_names" in args.given:
        return len(load_label_names(args.label_names)), args.label_names
    return len({label for label, _ in read_labelled(args.train)}), args.train


def fit_sentences(model: LlamaEmbeddingClassifier, *splits: list[Example]) -> list[list[Example]]:
    return fit_context(*splits, max_len=model.llama.config.max_seq_len, keep="first")


def classification_loss(
    batch: dict, model: nn.Module, batch_size: int, dtype: str = "float32"
) -> torch.Tensor:
    """Negative log-likelihood of the labels, summed and divided by the nominal batch size."""
    device = next(model.parameters()).device
    with mixed_precision(device, dtype):
        log_probs = model(*inputs_of(batch, device))
    labels = batch["labels"].to(device)
    return F.nll_loss(log_probs.float(), labels, reduction="sum") / batch_size


def train_epoch(
    model: nn.Module,
    loader: DataLoader,
    optimizer: Optimizer,
    loss: Loss,
    epoch: int,
    grad_accum: int = 1,
) -> float:
    """One pass over the loader; returns the mean loss of its batches.

    Args:
        grad_accum: batches per step of the optimizer.

    Raises:
        InputError: the loss is not finite; the weights are left as they were before that step.
    """
    model.train()
    total = 0.0
    batches = iter(tqdm(loader, desc=f"train-{epoch}", leave=False, disable=None))
    for step in itertools.count():
        group = list(itertools.islice(batches, grad_accum))
        if not group:
            break
        total += len(group) * update(model, group, loss, optimizer, f"epoch {epoch}, step {step}")
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
    args = with_defaults(args)
    check_out_files(args, "finetuning")
    device = pick_device(args.use_gpu)
    saved = read_checkpoint(args.filepath)
    config = SimpleNamespace(**saved["model_config"])
    tokenizer = Tokenizer(args.max_sentence_len, args.tokenizer_path)
    model = LlamaEmbeddingClassifier(config)
    model.load_state_dict(saved["model"])
    model = model.to(device)
    print(f"load model from {args.filepath}")
    dev_data = create_data(args.dev, tokenizer, "valid", eos=False)
    test_data = create_data(args.test, tokenizer, "test", eos=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # training warned of the rows that are cut
        dev_data, test_data = fit_sentences(model, dev_data, test_data)
    causal = model.llama.config.causal
    results, seconds = {}, {}
    for split, data in (("dev", dev_data), ("test", test_data)):
        start = time.perf_counter()
        with mixed_precision(device, args.dtype):
            results[split] = model_eval(make_loader(data, args, causal=causal), model, device)
        seconds[split] = time.perf_counter() - start
    report_results(args, results, seconds, device)


test.__test__ = False  # not a test of pytest's, whatever its name
