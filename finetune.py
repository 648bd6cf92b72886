"""`--option finetune`: train a classifier, keep its best epoch, and evaluate that."""

import argparse
import functools
import itertools
import time
import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from tqdm import tqdm

import methods
from base_llama import read_checkpoint
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
from lora import merge_lora
from optimizer import AdamW
from prompt_based import PromptClassifier, few_shot
from prompts import make_prompts
from recipe import Recipe
from saving import read_saved, same_label_names, save_model
from tokenizer import Tokenizer, check_vocabulary
from training import Loss, checkpoint_activations, mixed_precision, update
from tuning import adapt, count_parameters, frozen_digest, load_trained
from utils import InputError, peak_memory, pick_device, with_defaults


def train(args: argparse.Namespace) -> None:
    """Fine-tune on `args.train`; save to `args.filepath` at each new best accuracy on `args.dev`.

    After every epoch the train loss (mean over batches) and the accuracies on train (unless
    `args.skip_train_eval`) and dev are printed. `args.test` is only checked, so that a mistake in
    it shows before the training.
    """
    args = with_defaults(args, methods.defaults())
    run = FineTuning(args)
    best_dev_acc, best_epoch = -1.0, 0
    for epoch in range(args.epochs):
        start = time.perf_counter()
        train_loss = train_epoch(
            run.model,
            run.train_loader,
            run.optimizer,
            run.recipe.loss,
            epoch,
            args.grad_accum,
            run.recipe.after_step,
        )
        train_seconds = time.perf_counter() - start
        train_acc = train_f1 = None
        if not args.skip_train_eval:
            train_acc, train_f1, *_ = run.evaluate(run.train_eval_loader)
        dev_acc, dev_f1, *_ = run.evaluate(run.dev_loader)
        if dev_acc > best_dev_acc:
            best_dev_acc, best_epoch = dev_acc, epoch
            run.save()
        shown = "" if train_acc is None else f"train acc :: {train_acc:.3f}, "
        print(f"epoch {epoch}: train loss :: {train_loss:.3f}, {shown}dev acc :: {dev_acc:.3f}")
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
            train_sentences_per_second=len(run.train_loader.dataset) / train_seconds,
            seconds=time.perf_counter() - start,
            peak_memory_bytes=peak_memory(run.device),
            trained_parameters=count_parameters(run.model)[0],
        )
        if args.patience is not None and epoch - best_epoch >= args.patience:
            print(f"stop: dev has not become better for {args.patience} epochs")
            break
    run.finish()


class FineTuning:
    """A classifier, its data, and how it is trained.

    Args:
        args: the command line's.

    Raises:
        InputError: the flags or the data do not allow it.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        num_labels, label_names = count_labels(args)
        self.config = SimpleNamespace(
            hidden_dropout_prob=args.hidden_dropout_prob,
            pretrained_model_path=str(args.pretrained_model_path),
            num_labels=num_labels,
            option=args.option,
            causal=args.causal,
            label_names=label_names,
            **{name: getattr(args, name) for name in methods.defaults()},
        )
        self.device = pick_device(args.use_gpu)
        self.tokenizer = Tokenizer(args.max_sentence_len, args.tokenizer_path)
        self.model = build_model(self.config, self.tokenizer).to(self.device)
        self.config.causal = self.model.llama.config.causal
        if args.activation_checkpointing:
            self.checkpoint_activations()
        self.load_data()
        self.recipe = self.make_recipe()
        self.optimizer = AdamW(self.recipe.groups, lr=float(args.lr))
        if methods.chosen(args):
            n_trained, n_parameters = count_parameters(self.model)
            print(f"train {n_trained:,} of {n_parameters:,} parameters")

    def checkpoint_activations(self) -> None:
        if self.args.prompt_based and self.model.uses_cache:
            raise InputError(
                "--activation_checkpointing: labels of several tokens continue a --prompt_based "
                "causal model's prompt through its cache, which cannot be computed again"
            )
        checkpoint_activations(self.model.llama.layers)

    def load_data(self) -> None:
        """Make the loaders of train and dev."""
        args = self.args
        train_data, _ = create_data(args.train, self.tokenizer, "train", eos=False)
        dev_data = create_data(args.dev, self.tokenizer, "valid", eos=False)
        test_data = encode_labelled(args.test, self.tokenizer)  # counted among the rows too long
        if args.shots is not None:
            train_data = few_shot(train_data, args.shots, self.config.num_labels, args.seed)
        splits = (train_data, dev_data, test_data)
        train_data, dev_data, _ = as_read(self.model, self.config, self.tokenizer, *splits)
        self.train_loader = loader_for(self.model, train_data, args, shuffle=True)
        self.train_eval_loader = loader_for(self.model, train_data, args)
        if not self.model.llama.config.causal:
            # The assignment evaluates train in another shuffled order, which draws random numbers.
            self.train_eval_loader = self.train_loader
        self.dev_loader = loader_for(self.model, dev_data, args)

    def make_recipe(self) -> Recipe:
        """Plain fine-tuning, and what the methods make of it."""
        args = self.args
        log_probs = functools.partial(predict, device=self.device, dtype=args.dtype)
        recipe = Recipe(
            args=args,
            model=self.model,
            label_names=self.config.label_names,
            tokenizer=Tokenizer(tokenizer_model=self.tokenizer.model_path),
            log_probs=log_probs,
            loss=functools.partial(
                classification_loss, batch_size=args.batch_size, log_probs=log_probs
            ),
            groups=[
                {
                    "params": [p for p in self.model.parameters() if p.requires_grad],
                    "lr": float(args.lr),
                }
            ],
            n_steps=args.epochs * -(-len(self.train_loader) // args.grad_accum),
            evaluate=lambda: self.evaluate(self.dev_loader)[0],
        )
        methods.prepare(recipe)
        return recipe

    def evaluate(self, loader: DataLoader) -> tuple:
        """What `model_eval` returns."""
        with mixed_precision(self.device, self.args.dtype):
            return model_eval(loader, self.model, self.device)

    def save(self) -> None:
        save_model(self.model, self.optimizer, self.args, self.config, self.args.filepath)

    def finish(self) -> None:
        """Do what the methods do with the best weights."""
        if self.recipe.finish:
            best = read_checkpoint(self.args.filepath)["model"]
            load_trained(self.model, best, self.args.filepath)
            for call in self.recipe.finish:
                call()
            self.save()
        if methods.chosen(self.args):
            print(f"peak memory {peak_memory(self.device) / 2**30:.2f} GiB")


def count_labels(args: argparse.Namespace) -> tuple[int, list[str] | None]:
    """The number of labels, and their names where they are known.

    The label mapping tells them if it was given or a method needs the names, else train does.

    Raises:
        InputError: a file of labelled sentences has other labels.
    """
    names = None
    if "label_names" in args.given or methods.need_label_names(args):
        names = load_label_names(args.label_names)
        num_labels, known_from = len(names), args.label_names
    else:
        num_labels = len({label for label, _ in read_labelled(args.train)})
        known_from = args.train
    for filename in (args.train, args.dev, args.test):
        check_labels(filename, num_labels, known_from)
    return num_labels, names


def build_model(config: Any, tokenizer: Tokenizer) -> nn.Module:
    """The classifier that a configuration describes, before training.

    Args:
        config: what the classifiers take, and the methods' flags.
    """
    if config.prompt_based:
        if config.pooling is not None:
            raise InputError("--pooling: --prompt_based has no new head that states are pooled for")
        untruncated = Tokenizer(tokenizer_model=tokenizer.model_path)
        model = PromptClassifier(config, untruncated, config.label_names)
    else:
        model = LlamaEmbeddingClassifier(config)
    check_vocabulary(tokenizer, model.llama.vocab_size, config.pretrained_model_path)
    adapt(model, config)
    return model


def as_read(
    model: nn.Module, config: Any, tokenizer: Tokenizer, *splits: list[Example]
) -> list[list[Example]]:
    """The rows that the model reads: prompts or sentences, cut to its context."""
    if not config.prompt_based:
        return fit_context(*splits, max_len=model.llama.config.max_seq_len, keep="first")
    causal = model.llama.config.causal
    prompts = (
        make_prompts(data, config.prompt_template, config.label_names, tokenizer, causal=causal)
        for data in splits
    )
    return fit_context(*prompts, max_len=model.max_prompt_len, keep="last")


def loader_for(
    model: nn.Module, data: list[Example], args: argparse.Namespace, shuffle: bool = False
) -> DataLoader:
    """Batches that carry lengths if the model reads each row by its own."""
    causal = model.llama.config.causal
    with_lengths = getattr(model, "pooling", None) is not None
    return make_loader(data, args, causal=causal, shuffle=shuffle, with_lengths=with_lengths)


def predict(
    batch: dict, model: Callable[..., torch.Tensor], device: torch.device, dtype: str
) -> torch.Tensor:
    """Log-probabilities `(batch, num_labels)` in float32."""
    with mixed_precision(device, dtype):
        return model(*inputs_of(batch, device))


def classification_loss(
    batch: dict,
    model: nn.Module,
    batch_size: int,
    log_probs: Callable[[dict, nn.Module], torch.Tensor],
) -> torch.Tensor:
    """Negative log-likelihood of the labels, summed and divided by the nominal batch size."""
    predicted = log_probs(batch, model)
    labels = batch["labels"].to(predicted.device)
    return F.nll_loss(predicted, labels, reduction="sum") / batch_size


def train_epoch(
    model: nn.Module,
    loader: DataLoader,
    optimizer: Optimizer,
    loss: Loss,
    epoch: int,
    grad_accum: int = 1,
    after_step: Sequence[Callable[[nn.Module, int], None]] = (),
) -> float:
    """One pass over the loader; returns the mean loss of its batches.

    Args:
        grad_accum: batches per step of the optimizer. Where fewer are left for the last step, it
            is the smaller for it, as that of a last smaller batch is.
        after_step: called with the model and the number of steps taken in all epochs.

    Raises:
        InputError: the loss is not finite; the weights are left as they were before that step.
    """
    model.train()
    total = 0.0
    batches = iter(tqdm(loader, desc=f"train-{epoch}", leave=False, disable=None))
    steps_before = epoch * -(-len(loader) // grad_accum)
    for step in itertools.count():
        group = list(itertools.islice(batches, grad_accum))
        if not group:
            break
        when = f"epoch {epoch}, step {step}"
        total += grad_accum * update(model, group, loss, optimizer, when, n=grad_accum)
        for call in after_step:
            call(model, steps_before + step + 1)
    return total / len(loader)


def test(args: argparse.Namespace) -> None:
    """Load `args.filepath`, evaluate on dev and test, and write the predictions."""
    saved = read_saved(args.filepath)
    args = with_defaults(args, methods.defaults())
    config = SimpleNamespace(**(methods.defaults() | {"label_names": None} | saved["model_config"]))
    if args.load is not None:
        config.pretrained_model_path = args.pretrained_model_path
        if "label_names" in args.given:
            config.label_names = same_label_names(args, config)
    check_out_files(args, methods.out_file_kinds(args, "finetuning"))
    for filename in (args.dev, args.test):
        check_labels(filename, config.num_labels, args.filepath)
    device = pick_device(args.use_gpu)
    tokenizer = Tokenizer(args.max_sentence_len, args.tokenizer_path)
    model = build_model(config, tokenizer)
    load_trained(model, saved["model"], args.filepath)
    if "frozen" in saved and saved["frozen"] != frozen_digest(model):
        raise InputError(
            f"{args.filepath}: trained on other weights than {config.pretrained_model_path}; "
            "name them with --pretrained-model-path"
        )
    merge_lora(model)
    model = model.to(device)
    print(f"load model from {args.filepath}")
    dev_data = create_data(args.dev, tokenizer, "valid", eos=False)
    test_data = create_data(args.test, tokenizer, "test", eos=False)
    with warnings.catch_warnings():
        if args.load is None:  # else training has warned of the rows that are cut
            warnings.simplefilter("ignore")
        dev_data, test_data = as_read(model, config, tokenizer, dev_data, test_data)

    def evaluate(loader: DataLoader) -> tuple:
        with mixed_precision(device, args.dtype):
            return model_eval(loader, model, device)

    loaders = {"dev": loader_for(model, dev_data, args), "test": loader_for(model, test_data, args)}
    labels = config.label_names or [str(label) for label in range(config.num_labels)]
    report_results(args, loaders, evaluate, device, labels)


test.__test__ = False  # not a test of pytest's, whatever its name
