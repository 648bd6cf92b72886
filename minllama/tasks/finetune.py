"""`--option finetune`: train a classifier, keep its best epoch, and evaluate that."""

import argparse
import contextlib
import json
import math
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import nn
from torch.utils.data import DataLoader

from minllama import methods
from minllama.checkpoints.pt import read_checkpoint, write_checkpoint
from minllama.common.errors import InputError, in_gibibytes, missing_file
from minllama.common.files import file_fingerprint
from minllama.common.flags import ClassifySettings, TrainSettings, dataset_of
from minllama.common.progress import Pace
from minllama.common.settings import flag
from minllama.evaluation.classification import (
    append_metrics,
    check_metrics_file,
    model_eval,
    report_results,
)
from minllama.evaluation.plot import check_picture, draw
from minllama.kernels.adamw import FastAdamW
from minllama.methods.recipe import Method, Recipe
from minllama.methods.saved import (
    ClassifierConfig,
    count_parameters,
    load_classifier,
    load_trained,
    names_beside,
    read_saved,
    same_label_names,
    saved_model,
    write_saved,
)
from minllama.tasks.epoch import ClassificationLoss, LossOfModel, train_epoch
from minllama.tasks.resuming import (
    RUN,
    Claim,
    Keeper,
    Progress,
    Recorder,
    add_records,
    claimed,
)
from minllama.text.batches import Example, make_loader
from minllama.text.labelled import (
    check_labels,
    create_data,
    encode,
    load_label_names,
    read_labelled,
)
from minllama.training import distributed
from minllama.training.activation_checkpointing import checkpoint_activations
from minllama.training.step import check_dtype, compile_layers, mixed_precision
from tokenizer import Tokenizer
from utils import peak_memory, pick_device

# Of a saved run, what `--load` takes from it: what can be changed, and what cannot.
CHANGEABLE = ("train", "dev", "test", "label_names", "pretrained_model_path", "tokenizer_path")
CHANGEABLE += ("dtype", "batch_size")
FIXED = ("max_sentence_len", "causal")
# What a run's result depends on, besides the methods and what these files hold.
OF_THE_RESULT = ("option", "causal", "dtype", "max_sentence_len", "seed", "batch_size", "epochs")
OF_THE_RESULT += ("lr", "hidden_dropout_prob", "grad_accum", "skip_train_eval")
FILES = ("train", "dev", "test", "label_names", "pretrained_model_path", "tokenizer_path")
NOT_WITH_LOAD = {
    "save_every",
    "fresh",
    "grad_accum",
    "activation_checkpointing",
    "skip_train_eval",
    "compile",
    "plot",
}


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
    save_every: int | None = flag(
        None, "keep the state every so many steps, besides after every epoch", low=1
    )
    fresh: bool = flag(False, "begin anew where the same run was interrupted or has ended")
    methods: tuple[Method, ...] = ()
    filepath: str = ""

    @classmethod
    def from_args(cls, args: Any) -> Self:
        """Take what is known here, and the flags of methods."""
        return cls(**cls.known(vars(args)) | {"methods": methods.switched_on(vars(args))})

    @classmethod
    def from_saved_run(cls, given: dict[str, Any]) -> dict[str, Any]:
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

    def resolved(self) -> Self:
        """The best weights get a name from epochs, rate and methods, or as `load` says."""
        settings = self if self.load is not None else self.with_demo()
        suffix = methods.file_suffix(self.methods)
        filepath = self.load or f"finetune-{self.epochs}-{self.lr}{suffix}.pt"
        settings = settings.with_tokenizer().with_output_names("finetuning")
        return settings.replace(filepath=filepath)

    def to_dict(self) -> dict[str, Any]:
        """The flags of methods stand beside the others."""
        values = super().to_dict()
        del values["methods"]
        return values | methods.values_of(self.methods)

    def fingerprint(self) -> dict[str, Any]:
        """All that the result depends on, as JSON has it: settings, and the files they name."""
        values = {name: value for name, value in self.to_dict().items() if name in OF_THE_RESULT}
        values |= methods.values_of(self.methods)
        paths = {name: getattr(self, name) for name in FILES}
        if "label_names" not in self.explicit and not methods.need_label_names(self.methods):
            del paths["label_names"]
        values |= {
            name: file_fingerprint(path) for name, path in paths.items() if Path(path).exists()
        }
        return json.loads(json.dumps(values))

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
        return "pretrained_model_path" in self.explicit or self.load is not None

    def check_before_work(self, *outputs: str) -> None:
        """See that there is such a training, and that its results can be written.

        Args:
            outputs: what is written besides the predictions.

        Raises:
            InputError: they cannot, or a method does not allow it.
        """
        check_dtype(self.dtype)
        for method in self.methods if self.shard else ():
            if not method.takes_shards:
                spelled = method.spelled()
                raise InputError(f"--shard: does not go with {spelled}; leave one of them out")
        outputs += (self.plot,) if self.plot is not None else ()
        reads = [path for path in (self.load, self.filepath) if path and path not in outputs]
        self.check_output_names("finetuning", self.has_own_weights, *outputs, reads=reads)
        check_metrics_file(self.metrics_out)
        if self.plot is not None:
            check_picture(self.plot)


def finetune(args: argparse.Namespace) -> None:
    """Train, and evaluate the best epoch; or with `load` only evaluate.

    A training that was interrupted, however it was, goes on when it is started again; on a CPU,
    with the same number of threads, to the same weights as without the interruption. One that has
    ended is told again. The weights of another run are left alone.
    """
    settings = FinetuneSettings.from_args(args)
    if settings.load is not None:
        agree_on_files(settings)
        evaluate_saved(settings)
        return
    settings.check_before_work(settings.filepath)
    for path in (settings.train, settings.dev, settings.test, settings.pretrained_model_path):
        if not Path(path).exists():
            raise missing_file(path)
    result = settings.fingerprint()
    distributed.agree(result)
    data = dataset_of(settings.train, "train")
    with claimed(settings.filepath, result, data, settings.fresh) as claim:
        settings = settings.replace(filepath=claim.filepath)
        settings.check_before_work(settings.filepath)
        records = run_epochs(settings, claim) + evaluate_saved(settings)
        if settings.plot is not None:
            distributed.on_first(lambda: draw({settings.filepath: records}, settings.plot))


def agree_on_files(settings: FinetuneSettings) -> None:
    """See that all processes evaluate the same.

    Raises:
        InputError: they do not.
    """
    if distributed.n_processes() == 1:
        return
    files = [settings.dev, settings.test, settings.pretrained_model_path, settings.tokenizer_path]
    files += [settings.load, settings.label_names]
    files = [path for path in files if path is not None and Path(path).exists()]
    distributed.agree({path: file_fingerprint(path) for path in files})


def train(args: argparse.Namespace) -> None:
    """Fine-tune on `args.train`; save to `args.filepath` at each new best accuracy on `args.dev`.

    After every epoch the train loss (mean over batches) and the accuracies on train (unless
    `args.skip_train_eval`) and dev are printed. `args.test` is only checked, so that a mistake in
    it shows before the training. Called as a function it always begins anew.
    """
    run_epochs(FinetuneSettings.from_args(args))


def run_epochs(settings: FinetuneSettings, claim: Claim | None = None) -> list[dict]:
    """Train, and go on where the run with a claim was; leave its best weights in its file.

    Returns:
        the lines of metrics, one for each epoch.
    """
    run = FineTuning(settings, claim)
    keeper = run.keeper
    if (ended := keeper.ended()) is not None:
        log, records = ended
        print(f"{settings.filepath}: has ended; --fresh trains anew", file=sys.stderr)
        print(log, end="")
        if distributed.is_first():
            add_records(settings.metrics_out, records)
        return records
    progress = keeper.load(settings.epochs, run.n_steps)
    print(progress.log, end="")
    if distributed.is_first():
        add_records(settings.metrics_out, progress.records)
    run.pace = run.pace_from(progress)
    with contextlib.redirect_stdout(Recorder(progress)):
        while not run.stops(progress) and progress.epoch < settings.epochs:
            run.train_epoch(progress)
        run.finish(progress)
    return progress.records


class FineTuning:
    """A classifier, its data, and how it is trained.

    Raises:
        InputError: the flags or the data do not allow it.
    """

    def __init__(self, settings: FinetuneSettings, claim: Claim | None = None):
        self.settings, self.claim = settings, claim
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
        if settings.shard and shard_classifier(model, settings.dtype):
            self.dtype = "float32"  # of autocast, which has nothing left to do
        self.load_data()
        self.recipe = self.make_recipe()
        step = LossOfModel(self.recipe.loss, model)
        self.spread = distributed.data_parallel(step, all_used=False)
        self.optimizer = FastAdamW(self.recipe.groups, lr=settings.lr)
        self.keeper = Keeper(claim, model, self.optimizer, self.recipe.kept)
        if settings.advanced:
            n_trained, n_parameters = count_parameters(model)
            print(f"train {n_trained:,} of {n_parameters:,} parameters")

    def load_data(self) -> None:
        """Make the loaders of train and dev."""
        settings = self.settings
        train_data, _ = create_data(settings.train, self.tokenizer, "train", eos=False)
        dev_data = create_data(settings.dev, self.tokenizer, "valid", eos=False)
        test_data = encode(read_labelled(settings.test), self.tokenizer)  # for the count of cuts
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

    @property
    def n_steps(self) -> int:
        """Of an epoch."""
        return math.ceil(len(self.train_loader) / self.settings.grad_accum)

    def stops(self, progress: Progress) -> bool:
        """Whether a method ends the training behind the last epoch, which is then told."""
        calls = self.recipe.after_epoch if progress.epoch > 0 else []
        reasons = (call(progress.epoch - 1, progress.best_epoch) for call in calls)
        reason = next(filter(None, reasons), None)
        if reason is not None:
            print(reason)
        return reason is not None

    def pace_from(self, progress: Progress) -> Pace:
        """For the rest of the training."""
        n_epochs = self.settings.epochs - progress.epoch
        return Pace(n_epochs * self.n_steps - len(progress.losses), n_epochs)

    def train_epoch(self, progress: Progress) -> None:
        """One epoch: train, evaluate, keep the weights if they are the best, and tell."""
        settings, epoch = self.settings, progress.epoch
        n_steps = self.n_steps
        begin, before = time.perf_counter(), progress.seconds

        def keep() -> None:
            n_taken = len(progress.losses)
            progress.seconds = before + time.perf_counter() - begin
            if settings.save_every and n_taken % settings.save_every == 0 and n_taken < n_steps:
                self.keeper.save(progress, epoch * n_steps + n_taken)

        train_loss = train_epoch(
            self.model,
            self.train_loader,
            self.optimizer,
            self.recipe.loss,
            epoch,
            settings.grad_accum,
            self.recipe.after_step,
            spread=self.spread,
            seed=settings.seed,
            progress=progress,
            keep=keep,
            pace=self.pace,
        )
        train_seconds = before + time.perf_counter() - begin
        train_acc = train_f1 = None
        if not settings.skip_train_eval:
            train_acc, train_f1, *_ = self.evaluate(self.train_eval_loader)
        dev_acc, dev_f1, *_ = self.evaluate(self.dev_loader)
        if dev_acc > progress.best_dev_acc:
            progress.best_dev_acc, progress.best_epoch = dev_acc, epoch
            write_saved(self.saved(), settings.filepath)
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
            "train_sentences_per_second": len(self.train_loader.dataset) / train_seconds,
            "seconds": before + time.perf_counter() - begin,
            "peak_memory_bytes": peak_memory(self.device),
            "trained_parameters": count_parameters(self.model)[0],
        }
        progress.records.append(record)
        progress.epoch, progress.losses, progress.seconds = epoch + 1, [], 0.0
        self.keeper.save(progress, (epoch + 1) * n_steps)
        self.pace.record("pause")
        if distributed.is_first():
            append_metrics(settings.metrics_out, **record)

    def saved(self) -> dict[str, Any]:
        """The weights, under the settings with which they were trained."""
        config = argparse.Namespace(
            **self.config.to_dict() | methods.values_of(self.settings.methods)
        )
        saved = saved_model(self.model, self.optimizer, self.settings, config)
        return saved if self.claim is None else saved | {RUN: json.dumps(self.claim.fingerprint)}

    def finish(self, progress: Progress) -> None:
        """Do what the methods do with the best weights; the run has then ended."""
        filepath, weights = self.settings.filepath, None
        if self.recipe.finish:
            load_trained(self.model, read_checkpoint(filepath)["model"], filepath)
            for call in self.recipe.finish:
                call()
            weights = self.saved()
            print(f"save the model to {filepath}")
        if self.settings.advanced:
            print(f"peak memory {in_gibibytes(peak_memory(self.device))}")
        if self.claim is not None:
            self.keeper.end(progress, weights)
        elif weights is not None:
            distributed.on_first(lambda: write_checkpoint(weights, filepath))


def count_labels(settings: FinetuneSettings) -> tuple[int, list[str] | None]:
    """The number of labels, and their names where they are known.

    The label mapping tells them if it was given or a method needs the names, else train does.

    Raises:
        InputError: a file of labelled sentences has other labels.
    """
    names = None
    if "label_names" in settings.explicit or methods.need_label_names(settings.methods):
        names = load_label_names(settings.label_names)
        num_labels, known_from = len(names), settings.label_names
    else:
        num_labels = len({label for label, _ in read_labelled(settings.train)})
        known_from = settings.train
    for filename in (settings.train, settings.dev, settings.test):
        check_labels(read_labelled(filename), filename, num_labels, known_from)
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


def shard_classifier(model: nn.Module, dtype: str) -> bool:
    """Let each process hold a part of a classifier; tells whether there are several."""
    return distributed.shard(model, model.llama.layers, dtype)


def test(args: argparse.Namespace) -> None:
    """Load `args.filepath`, evaluate on dev and test, and write the predictions."""
    evaluate_saved(FinetuneSettings.from_args(args))


def evaluate_saved(settings: FinetuneSettings) -> list[dict[str, Any]]:
    """What `test` does; returns what `report_results` does."""
    saved = read_saved(settings.filepath, FinetuneSettings)
    config = saved.config.replace(init_weights=False)
    if settings.load is not None:
        config = config.replace(pretrained_model_path=settings.pretrained_model_path)
        if "label_names" in settings.explicit:
            config = config.replace(label_names=same_label_names(settings, config))
    settings.check_before_work()
    for filename in (settings.dev, settings.test):
        check_labels(read_labelled(filename), filename, config.num_labels, settings.filepath)
    device = pick_device(settings.use_gpu)
    tokenizer = Tokenizer(settings.max_sentence_len, settings.tokenizer_path)
    model = load_classifier(saved, config, tokenizer).to(device)
    dtype = settings.dtype
    if settings.shard and distributed.n_processes() > 1:
        shard_classifier(model, dtype)
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

    labels = config.label_names or names_beside(settings.dev, config.num_labels)
    return report_results(settings, loaders, evaluate, device, labels)


test.__test__ = False  # not a test of pytest's, whatever its name
