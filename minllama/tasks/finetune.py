"""`--option finetune`: train a classifier, keep the best epoch, evaluate it on dev and test."""

import itertools
import sys
import time
import warnings
from typing import Any

import torch
import torch.nn.functional as F

from minllama.common.errors import explain_out_of_memory
from minllama.common.flags import LESS_TRAINING_MEMORY, dataset_name
from minllama.common.program import survive_closed_stdout
from minllama.common.progress import progress_bar
from minllama.evaluation.classification import report_results
from minllama.evaluation.plot import draw
from minllama.kernels.cpu import keep_freed_memory
from minllama.methods.classify import Classifier, build, load
from minllama.methods.settings import FinetuneSettings
from minllama.methods.train_state import TrainState
from minllama.text.batches import Example
from minllama.text.labelled import read_splits
from minllama.training import distributed, run
from minllama.training.precision import check_finite
from utils import to_device


def finetune(settings: FinetuneSettings) -> None:
    """Train a classifier, or load one, and evaluate it on dev and test.

    A run that was interrupted is resumed; on a CPU, with the same number of threads, it ends with
    the weights of an uninterrupted run. A finished run is only evaluated. Another run's weights are
    never replaced.
    """
    settings.check()
    keep_freed_memory()
    with explain_out_of_memory("fine-tuning", LESS_TRAINING_MEMORY), survive_closed_stdout():
        fingerprint = settings.fingerprint
        distributed.assert_same_on_all_ranks(fingerprint)
        if settings.load is not None:
            evaluate_saved(settings)
            return
        data = dataset_name(settings.train, "train")
        with run.lock_weights_path(settings.filepath, fingerprint, data) as filepath:
            if filepath != settings.filepath:
                print(
                    f"{settings.filepath} belongs to another run; saving to {filepath}",
                    file=sys.stderr,
                )
                settings = settings.replace(filepath=filepath)
                settings.check()
            if not settings.fresh and run.is_finished(filepath, fingerprint):
                print(f"{filepath}: this run is finished; --fresh trains again", file=sys.stderr)
                evaluate_saved(settings)
                return
            try:
                train_and_evaluate(settings, fingerprint)
            except KeyboardInterrupt:
                print("interrupted; the same command resumes the run", file=sys.stderr)
                raise


def evaluate_saved(settings: FinetuneSettings) -> None:
    """Evaluate the classifier that a run saved on dev and test."""
    if settings.plot is not None:
        warnings.warn("--plot: nothing is trained, so nothing is drawn", stacklevel=2)
    classifier = load(settings, settings.filepath)
    paths = {"dev": settings.dev, "test": settings.test}
    sentences, _ = read_splits(paths, classifier.config.num_labels, settings.filepath)
    report(settings, classifier, *classifier.tokenize(*sentences.values()))


def train_and_evaluate(
    settings: FinetuneSettings, fingerprint: dict[str, Any] | None = None
) -> None:
    """Train or resume, then evaluate the best epoch's weights on dev and test."""
    classifier, (train, dev, test) = build(settings)
    records = train_epochs(settings, classifier, train, dev, fingerprint)
    classifier.merge()
    records += report(settings, classifier, dev, test)
    if settings.plot is not None:
        plot, runs = settings.plot, {settings.filepath: records}
        distributed.on_rank0(lambda: draw(runs, plot))


def report(
    settings: FinetuneSettings, classifier: Classifier, dev: list[Example], test: list[Example]
) -> list[dict[str, Any]]:
    """Evaluate dev and test, print and write the results; return their metrics."""
    print(f"load model from {settings.filepath}")
    loaders = {}
    for split, examples in (("dev", dev), ("test", test)):
        print(f"load {len(examples)} data from {getattr(settings, split)}")
        loaders[split] = classifier.loader(examples, settings.batch_size)
    names = classifier.config.label_names or list(map(str, range(classifier.config.num_labels)))
    return report_results(settings, loaders, classifier.evaluate, classifier.device, names)


def train_epochs(
    settings: FinetuneSettings,
    classifier: Classifier,
    train_examples: list[Example],
    dev_examples: list[Example],
    fingerprint: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Train, and save to `filepath` at each new best accuracy on dev.

    Args:
        fingerprint: identifies the run, which is resumed if it has a state; None disables
            resuming.

    Returns:
        the metrics of each epoch. The classifier then has the best epoch's weights.

    Raises:
        InputError: the loss is not finite; on a CPU, before the optimizer step.
    """
    model, device, methods = classifier.model, classifier.device, settings.methods
    # The assignment evaluates train in a new random order, which draws random numbers.
    is_causal = model.llama.config.causal
    eval_loader = classifier.loader(train_examples, settings.batch_size, shuffle=not is_causal)
    training = TrainState(settings, classifier, train_examples, dev_examples)
    optimizer = training.optimizer
    training.start_or_resume(fingerprint)

    for epoch in range(training.epoch, settings.epochs):
        reasons = [method.reason_to_stop(epoch - 1, training.best_epoch) for method in methods]
        if any(reasons):
            print(next(filter(None, reasons)))
            break
        start = time.perf_counter() - training.seconds
        model.train()
        remaining = training.remaining_batches()
        bar = progress_bar(remaining, desc=f"train-{epoch}", total=training.n_batches)
        batches = iter(bar)
        for step in range(training.step, (epoch + 1) * training.steps_per_epoch):
            step_batches = list(itertools.islice(batches, settings.grad_accum))
            step_loss = torch.zeros((), device=device)
            optimizer.zero_grad()
            with distributed.rank_rng(settings.seed, step, device):
                for batch in step_batches:
                    mine, weight = distributed.local_slice(len(batch.labels))
                    batch = batch.select(mine)
                    log_probs = training.log_probs(batch)  # (batch, num_labels)
                    labels = to_device(batch.labels, device)
                    # As in the assignment, a smaller last batch counts for less.
                    loss = F.nll_loss(log_probs, labels, reduction="sum") / settings.batch_size
                    for method in methods:
                        loss = method.loss(training, batch, loss)
                    loss = loss * weight / settings.grad_accum
                    loss.backward()
                    step_loss += loss.detach()
            distributed.sum_gradients(model)
            distributed.sum_over_ranks(step_loss)
            if device.type == "cpu":  # on a GPU, reading the loss would wait for it
                check_finite(step_loss, f"epoch {epoch}, step {len(training.losses)}")
            optimizer.step()
            training.losses.append(step_loss)
            for method in methods:
                method.after_step(training, step + 1)
            if device.type == "cpu":
                bar.set_postfix(loss=f"{step_loss.item():.3f}", refresh=False)
            if settings.save_every and len(training.losses) % settings.save_every == 0:
                training.seconds = time.perf_counter() - start
                training.save()

        train_seconds = time.perf_counter() - start
        losses = torch.stack(training.losses)
        check_finite(losses, f"epoch {epoch}")
        train_loss = sum(settings.grad_accum * x for x in losses.tolist()) / training.n_batches
        train_result = None if settings.skip_train_eval else classifier.evaluate(eval_loader)
        dev_result = classifier.evaluate(training.dev_loader)
        if dev_result.accuracy > training.best_dev_acc:
            training.best_dev_acc, training.best_epoch = dev_result.accuracy, epoch
            training.save_best()
        train_acc = ""
        if train_result is not None:
            train_acc = f"train acc :: {train_result.accuracy:.3f}, "
        print(
            f"epoch {epoch}: train loss :: {train_loss:.3f}, {train_acc}"
            f"dev acc :: {dev_result.accuracy:.3f}"
        )
        training.end_epoch(
            train_loss=train_loss,
            train_accuracy=None if train_result is None else train_result.accuracy,
            train_macro_f1=None if train_result is None else train_result.macro_f1,
            dev_accuracy=dev_result.accuracy,
            dev_macro_f1=dev_result.macro_f1,
            train_seconds=train_seconds,
            train_sentences_per_second=len(train_examples) / train_seconds,
            seconds=time.perf_counter() - start,
        )
    training.finish()
    return training.records


def train(args: Any) -> None:
    """Fine-tune from scratch and save to `args.filepath`; the assignment's function.

    It writes no predictions, so `dev_out` and `test_out` are not checked.
    """
    settings = FinetuneSettings.from_args(args)
    settings.replace(explicit=()).with_output_names("finetuning").check()
    classifier, (train_examples, dev_examples, _) = build(settings)
    train_epochs(settings, classifier, train_examples, dev_examples)


def test(args: Any) -> None:
    """Evaluate the classifier in `args.filepath` on dev and test; the assignment's function."""
    settings = FinetuneSettings.from_args(args)
    settings = settings.replace(load=settings.filepath)
    settings.check()
    evaluate_saved(settings)


test.__test__ = False  # type: ignore[attr-defined]  # not one of pytest's
