"""`--option finetune`: train a classifier, keep its best epoch, and evaluate that."""

import argparse
import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from tqdm import tqdm

import methods
from checkpoints.pt import read_checkpoint
from methods.recipe import Loss, Method, Recipe
from optimizer import AdamW
from tasks.evaluation import (
    append_metrics,
    check_metrics_file,
    inputs_of,
    model_eval,
    report_results,
)
from tasks.saving import (
    ClassifierConfig,
    count_parameters,
    frozen_digest,
    load_trained,
    read_saved,
    save_model,
)
from tasks.settings import ClassifySettings, TrainSettings
from text.labelled import (
    Example,
    check_labels,
    create_data,
    encode_labelled,
    load_label_names,
    make_loader,
    read_labelled,
)
from tokenizer import Tokenizer
from training import distributed
from training.checkpointing import checkpoint_activations
from training.cpu import accelerate
from training.folder import fingerprint
from training.step import check_dtype, check_finite, compile_layers, mixed_precision, update
from utils import InputError, flag, in_gibibytes, peak_memory, pick_device, to_device

# Of a saved run, what `--load` takes from it: what can be changed, and what cannot.
CHANGEABLE = ("train", "dev", "test", "label_names", "pretrained_model_path", "tokenizer_path")
CHANGEABLE += ("dtype", "batch_size")
FIXED = ("max_sentence_len", "causal")
NOT_WITH_LOAD = {"grad_accum", "activation_checkpointing", "skip_train_eval", "compile"}


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(ClassifySettings, TrainSettings):
    """How a classifier is trained, or a saved one evaluated.

    Attributes:
        methods: those that are on.
        filepath: where the best weights are kept.
    """

    title = "finetune"
    description = None
    takes_methods = True

    skip_train_eval: bool = flag(False, "do not evaluate train after every epoch")
    load: str | None = flag(
        None, "train nothing, evaluate what an earlier run saved", metavar="CHECKPOINT"
    )
    methods: tuple[Method, ...] = ()
    filepath: str = ""

    @classmethod
    def from_args(cls, args: Any) -> Self:
        """Take what is known here, and the flags of methods."""
        return cls(**cls.known(vars(args)) | {"methods": methods.switched_on(vars(args))})

    @classmethod
    def with_implied(cls, given: dict[str, Any]) -> dict[str, Any]:
        """With `load` the settings of the saved run, for the flags that are absent.

        Raises:
            InputError: a flag would change what cannot be changed any more, or would not act.
        """
        if given.get("load") is None:
            return given
        if unused := NOT_WITH_LOAD.intersection(given):
            raise InputError(f"--{min(unused)}: --load trains nothing; leave it out")
        run = read_saved(given["load"], cls)
        fixed = {name: run.args[name] for name in FIXED if name in run.args}
        fixed |= {"causal": run.config.causal} | methods.values_of(run.methods)
        for name, value in fixed.items():
            if name in given and given[name] != value:
                raise InputError(f"{run.path}: trained with {name} {value}; leave the flag out")
        return {name: run.args[name] for name in CHANGEABLE if name in run.args} | fixed | given

    def completed(self) -> Self:
        """The best weights get a name from epochs, rate and methods, or as `load` says."""
        settings = self if self.load is not None else self.with_demo()
        suffix = methods.file_suffix(self.methods)
        filepath = self.load or f"finetune-{self.epochs}-{self.lr}{suffix}.pt"
        settings = settings.with_tokenizer().with_output_names("finetuning")
        return settings.replace(filepath=filepath)

    def plain(self) -> dict[str, Any]:
        """The flags of methods stand beside the others."""
        values = super().plain()
        del values["methods"]
        return values | methods.values_of(self.methods)

    @property
    def advanced(self) -> dict[str, Any]:
        return methods.changed_values(self.methods)

    @property
    def checkpoints(self) -> list[str]:
        """The checkpoint, and what `load` names."""
        return [self.pretrained_model_path, *([] if self.load is None else [self.load])]

    @property
    def has_own_weights(self) -> bool:
        """Whether the model may be another one than the assignment's."""
        return "pretrained_model_path" in self.given or self.load is not None

    def check_before_work(self, *outputs: str) -> None:
        """See that there is such a training, and that its results can be written.

        Args:
            outputs: what is written besides the predictions.
        """
        check_dtype(self.dtype)
        self.check_output_names("finetuning", self.has_own_weights, *outputs)
        check_metrics_file(self.metrics_out)


def finetune(args: argparse.Namespace) -> None:
    """Train, and evaluate the best epoch; or with `load` only evaluate."""
    settings = FinetuneSettings.from_args(args)
    if settings.load is None:
        settings.check_before_work(settings.filepath)
        train(args)
    test(args)


def train(args: argparse.Namespace) -> None:
    """Fine-tune on `args.train`; save to `args.filepath` at each new best accuracy on `args.dev`.

    After every epoch the train loss (mean over batches) and the accuracies on train (unless
    `args.skip_train_eval`) and dev are printed. `args.test` is only checked, so that a mistake in
    it shows before the training.
    """
    settings = FinetuneSettings.from_args(args)
    files = [settings.train, settings.dev, settings.test, settings.pretrained_model_path]
    if distributed.n_processes() > 1:
        distributed.agree({path: fingerprint(path) for path in files if Path(path).exists()})
    run = FineTuning(settings)
    best_dev_acc, best_epoch = -1.0, 0
    for epoch in range(settings.epochs):
        start = time.perf_counter()
        train_loss = train_epoch(
            run.model,
            run.train_loader,
            run.optimizer,
            run.recipe.loss,
            epoch,
            settings.grad_accum,
            run.recipe.after_step,
            spread=run.spread,
            seed=settings.seed,
        )
        train_seconds = time.perf_counter() - start
        train_acc = train_f1 = None
        if not settings.skip_train_eval:
            train_acc, train_f1, *_ = run.evaluate(run.train_eval_loader)
        dev_acc, dev_f1, *_ = run.evaluate(run.dev_loader)
        if dev_acc > best_dev_acc:
            best_dev_acc, best_epoch = dev_acc, epoch
            run.save()
        shown = "" if train_acc is None else f"train acc :: {train_acc:.3f}, "
        print(f"epoch {epoch}: train loss :: {train_loss:.3f}, {shown}dev acc :: {dev_acc:.3f}")
        record = {
            "option": "finetune",
            "epoch": epoch,
            "train_loss": train_loss,
            "train_accuracy": train_acc,
            "train_macro_f1": train_f1,
            "dev_accuracy": dev_acc,
            "dev_macro_f1": dev_f1,
            "train_seconds": train_seconds,
            "train_sentences_per_second": len(run.train_loader.dataset) / train_seconds,
            "seconds": time.perf_counter() - start,
            "peak_memory_bytes": peak_memory(run.device),
            "trained_parameters": count_parameters(run.model)[0],
        }
        if distributed.is_first():
            append_metrics(settings.metrics_out, **record)
        reasons = (call(epoch, best_epoch) for call in run.recipe.after_epoch)
        if reason := next(filter(None, reasons), None):
            print(reason)
            break
    run.finish()


class FineTuning:
    """A classifier, its data, and how it is trained.

    Raises:
        InputError: the flags or the data do not allow it.
    """

    def __init__(self, settings: FinetuneSettings):
        self.settings = settings
        num_labels, label_names = count_labels(settings)
        self.device = pick_device(settings.use_gpu)
        self.tokenizer = Tokenizer(settings.max_sentence_len, settings.tokenizer_path)
        config = ClassifierConfig(
            pretrained_model_path=settings.pretrained_model_path,
            num_labels=num_labels,
            option=settings.option,
            hidden_dropout_prob=settings.hidden_dropout_prob,
            causal=settings.causal,
            label_names=label_names,
            keep_bfloat16=settings.dtype == "bfloat16"
            and not settings.shard
            and methods.keep_bfloat16(settings.methods),
        )
        model = methods.build_classifier(config, settings.methods, self.tokenizer)
        self.model = model.to(self.device)
        self.config = config.replace(causal=model.llama.config.causal)
        if settings.activation_checkpointing:
            if model.uses_cache:
                raise InputError(
                    "--activation_checkpointing: labels of several tokens continue a causal "
                    "model's prompt through its cache, which cannot be computed again"
                )
            checkpoint_activations(model.llama.layers)
        if settings.compile:
            compile_layers(model.llama.layers)
        self.dtype = settings.dtype
        if settings.shard and shard_classifier(model, settings.methods, settings.dtype):
            self.dtype = "float32"  # of autocast, which has nothing left to do
        self.load_data()
        self.recipe = self.make_recipe()
        accelerate(model)
        step = LossOfModel(self.recipe.loss, model)
        self.spread = distributed.data_parallel(step, all_used=False)
        self.optimizer = AdamW(self.recipe.groups, lr=settings.lr)
        if settings.advanced:
            n_trained, n_parameters = count_parameters(model)
            print(f"train {n_trained:,} of {n_parameters:,} parameters")

    def load_data(self) -> None:
        """Make the loaders of train and dev."""
        settings = self.settings
        train_data, _ = create_data(settings.train, self.tokenizer, "train", eos=False)
        dev_data = create_data(settings.dev, self.tokenizer, "valid", eos=False)
        test_data = encode_labelled(settings.test, self.tokenizer)  # counted among rows too long
        for method in settings.methods:
            train_data = method.choose(train_data, self.config.num_labels, settings.seed)
        train_data, dev_data, _ = methods.rows_for(
            self.model, settings.methods, self.tokenizer, train_data, dev_data, test_data
        )
        self.train_loader = self.loader_for(train_data, shuffle=True)
        self.train_eval_loader = self.loader_for(train_data)
        if not self.config.causal:
            # The assignment evaluates train in another shuffled order, which draws random numbers.
            self.train_eval_loader = self.train_loader
        self.dev_loader = self.loader_for(dev_data)

    def loader_for(self, data: list[Example], shuffle: bool = False) -> DataLoader:
        return loader_for(self.model, data, self.settings, self.tokenizer, shuffle)

    def make_recipe(self) -> Recipe:
        """Plain fine-tuning, and what the methods make of it."""
        settings = self.settings
        trained = [p for p in self.model.parameters() if p.requires_grad]
        recipe = Recipe(
            model=self.model,
            label_names=self.config.label_names,
            tokenizer=self.tokenizer,
            loss=ClassificationLoss(settings.batch_size, self.device, self.dtype),
            groups=[{"params": trained, "lr": settings.lr}],
            batch_size=settings.batch_size,
            n_steps=settings.epochs * math.ceil(len(self.train_loader) / settings.grad_accum),
            evaluate=lambda: self.evaluate(self.dev_loader)[0],
        )
        for method in settings.methods:
            method.prepare(recipe)
        return recipe

    def evaluate(self, loader: DataLoader) -> tuple:
        """What `model_eval` returns."""
        with mixed_precision(self.device, self.dtype):
            return model_eval(loader, self.model, self.device)

    def save(self) -> None:
        """Keep the weights, under the settings with which they were trained."""
        config = argparse.Namespace(
            **self.config.plain() | methods.values_of(self.settings.methods)
        )
        save_model(self.model, self.optimizer, self.settings, config, self.settings.filepath)

    def finish(self) -> None:
        """Do what the methods do with the best weights."""
        if self.recipe.finish:
            best = read_checkpoint(self.settings.filepath)["model"]
            load_trained(self.model, best, self.settings.filepath)
            for call in self.recipe.finish:
                call()
            self.save()
        if self.settings.advanced:
            print(f"peak memory {in_gibibytes(peak_memory(self.device))}")


def count_labels(settings: FinetuneSettings) -> tuple[int, list[str] | None]:
    """The number of labels, and their names where they are known.

    The label mapping tells them if it was given or a method needs the names, else train does.

    Raises:
        InputError: a file of labelled sentences has other labels.
    """
    names = None
    if "label_names" in settings.given or methods.need_label_names(settings.methods):
        names = load_label_names(settings.label_names)
        num_labels, known_from = len(names), settings.label_names
    else:
        num_labels = len({label for label, _ in read_labelled(settings.train)})
        known_from = settings.train
    for filename in (settings.train, settings.dev, settings.test):
        check_labels(filename, num_labels, known_from)
    return num_labels, names


def loader_for(
    model: nn.Module,
    data: list[Example],
    settings: FinetuneSettings,
    tokenizer: Tokenizer,
    shuffle: bool = False,
) -> DataLoader:
    """Batches that carry lengths if the model reads each row by its own."""
    return make_loader(
        data,
        settings.batch_size,
        tokenizer.pad_id,
        causal=model.llama.config.causal,
        shuffle=shuffle,
        with_lengths=model.reads_lengths,
    )


@dataclass(frozen=True)
class ClassificationLoss(Loss):
    """Negative log-likelihood of the labels, summed and divided by the nominal batch size."""

    batch_size: int
    device: torch.device
    dtype: str

    def log_probs(
        self, batch: dict, model: Callable, offset: torch.Tensor | None = None
    ) -> torch.Tensor:
        offsets = {} if offset is None else {"offset": offset}
        with mixed_precision(self.device, self.dtype):
            return model(*inputs_of(batch, self.device), **offsets)

    def __call__(self, batch: dict, model: nn.Module) -> torch.Tensor:
        log_probs = self.log_probs(batch, model)
        labels = to_device(batch["labels"], self.device)
        return F.nll_loss(log_probs, labels, reduction="sum") / self.batch_size


class LossOfModel(nn.Module):
    """The loss of a batch, with the model inside, as those want it who add up gradients.

    Args:
        loss: of a batch and a model.
    """

    def __init__(self, loss: Callable[[dict, nn.Module], torch.Tensor], model: nn.Module):
        super().__init__()
        self.loss, self.model = loss, model

    def forward(self, batch: dict) -> torch.Tensor:
        """The loss of this process's share of a batch, a scalar."""
        names = [name for name, value in batch.items() if isinstance(value, torch.Tensor)]
        rows, counts = distributed.share(*(batch[name] for name in names))
        loss = self.loss(dict(zip(names, rows, strict=True)), self.model)
        return loss if counts else 0 * loss


def shard_classifier(model: nn.Module, chosen: Sequence[Method], dtype: str) -> bool:
    """Let each process hold a part of a classifier.

    Returns:
        whether there are several.

    Raises:
        InputError: a method does not allow it.
    """
    for method in chosen:
        if not method.takes_shards:
            raise InputError(f"--shard: does not go with {method.spelled()}; leave one of them out")
    accelerate(model)
    return distributed.shard(model, model.llama.layers, dtype)


def train_epoch(
    model: nn.Module,
    loader: DataLoader,
    optimizer: Optimizer,
    loss: Callable[[dict, nn.Module], torch.Tensor],
    epoch: int,
    grad_accum: int = 1,
    after_step: Sequence[Callable[[nn.Module, int], None]] = (),
    *,
    spread: nn.Module | None = None,
    seed: int = 0,
) -> float:
    """One pass over the loader; returns the mean loss of its batches.

    Args:
        grad_accum: batches per step of the optimizer. The last step of an epoch may have fewer; its
            gradient is then smaller in proportion.
        after_step: called with the model and the number of steps taken in all epochs.
        spread: the `LossOfModel` of loss and model in several processes.
        seed: of what these draw apart.

    Raises:
        InputError: the loss is not finite; on a CPU the weights are left as they were before that
            step.
    """
    spread = LossOfModel(loss, model) if spread is None else spread
    device = next(model.parameters()).device
    model.train()
    means = []
    batches = iter(tqdm(loader, desc=f"train-{epoch}", leave=False, disable=None))
    n_steps = math.ceil(len(loader) / grad_accum)
    for step in range(n_steps):
        group = list(itertools.islice(batches, grad_accum))
        with distributed.own_draws(seed, epoch * n_steps + step, device):
            losses = losses_of(group, spread, grad_accum)
            means.append(update(model, losses, optimizer, f"epoch {epoch}, step {step}"))
        for call in after_step:
            call(model, epoch * n_steps + step + 1)
    means = torch.stack(means)
    check_finite(means, f"epoch {epoch}")
    return sum(grad_accum * mean for mean in means.tolist()) / len(loader)


def losses_of(batches: list[dict], spread: nn.Module, grad_accum: int) -> Iterator[torch.Tensor]:
    """The loss of each batch, as a share of their mean."""
    for i, batch in enumerate(batches, start=1):
        distributed.add_up_now(spread, i == len(batches))
        yield spread(batch) / grad_accum


def test(args: argparse.Namespace) -> None:
    """Load `args.filepath`, evaluate on dev and test, and write the predictions."""
    settings = FinetuneSettings.from_args(args)
    saved = read_saved(settings.filepath, FinetuneSettings)
    config = saved.config.replace(init_weights=False)
    if settings.load is not None:
        config = config.replace(pretrained_model_path=settings.pretrained_model_path)
        if "label_names" in settings.given:
            config = config.replace(label_names=same_label_names(settings, config))
    settings.check_before_work()
    for filename in (settings.dev, settings.test):
        check_labels(filename, config.num_labels, settings.filepath)
    device = pick_device(settings.use_gpu)
    tokenizer = Tokenizer(settings.max_sentence_len, settings.tokenizer_path)
    model = methods.build_classifier(config, saved.methods, tokenizer)
    load_trained(model, saved.weights, settings.filepath)
    if saved.frozen not in (None, frozen_digest(model)):
        raise InputError(
            f"{settings.filepath}: trained on other weights than {config.pretrained_model_path}; "
            "name them with --pretrained-model-path"
        )
    for method in saved.methods:
        method.merge(model)
    accelerate(model)
    model, dtype = model.to(device), settings.dtype
    if settings.shard and distributed.n_processes() > 1:
        shard_classifier(model, saved.methods, dtype)
        dtype = "float32"
    print(f"load model from {settings.filepath}")
    splits = {
        split: create_data(getattr(settings, split), tokenizer, split, eos=False)
        for split in ("dev", "test")
    }
    with warnings.catch_warnings():
        if settings.load is None:  # else training has warned of the rows that are cut
            warnings.simplefilter("ignore")
        rows = methods.rows_for(model, saved.methods, tokenizer, *splits.values())
    loaders = {
        split: loader_for(model, data, settings, tokenizer)
        for split, data in zip(splits, rows, strict=True)
    }

    def evaluate(loader: DataLoader) -> tuple:
        with mixed_precision(device, dtype):
            return model_eval(loader, model, device)

    labels = config.label_names or [str(label) for label in range(config.num_labels)]
    report_results(settings, loaders, evaluate, device, labels)


test.__test__ = False  # not a test of pytest's, whatever its name


def same_label_names(settings: FinetuneSettings, config: ClassifierConfig) -> list[str]:
    """The names in `settings.label_names`.

    Raises:
        InputError: there are more or fewer than labels, or the model was trained with others.
    """
    names = load_label_names(settings.label_names)
    if len(names) != config.num_labels or config.label_names not in (None, names):
        known = config.label_names or f"{config.num_labels} labels"
        raise InputError(f"{settings.label_names}: {settings.load} was trained with {known}")
    return names
