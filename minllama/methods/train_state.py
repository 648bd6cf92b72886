"""A fine-tuning run: model, optimizer, counters, and how to save and resume them."""

import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from minllama.checkpoints.pt import read_checkpoint
from minllama.common.errors import InputError, in_gibibytes
from minllama.evaluation.metrics import append_metrics
from minllama.kernels.adamw import FastAdamW
from minllama.methods.classify import Classifier
from minllama.methods.saved import count_parameters, load_weights, save_model
from minllama.methods.settings import FinetuneSettings
from minllama.text.batches import Batch, Example
from minllama.text.lines import lines_of
from minllama.training import distributed, run
from minllama.training.precision import mixed_precision
from utils import peak_memory, to_device

COUNTERS = {  # attributes that are saved, with their types
    "epoch": int,
    "best_dev_acc": float,
    "best_epoch": int,
    "seconds": (int, float),
    "records": list,
    "losses": list,
}


class TrainState:
    """A fine-tuning run in progress, as the loop and the hooks of methods see it.

    Args:
        train, dev: examples to train on, and those used to select the best epoch.

    Attributes:
        n_batches, steps_per_epoch: batches and optimizer steps of an epoch.
        groups: the optimizer's parameter groups.
        method_state: tensors of methods that change during training; saved with the state.
        method_constants: tensors of methods that stay the same; not saved, but computed again.
        epoch: the current epoch.
        losses: losses of this epoch's steps so far, scalars on the model's device.
        seconds: time spent in this epoch before the run was resumed.
        best_dev_acc, best_epoch: the best finished epoch and its accuracy on dev.
        records: the metrics of the finished epochs.
        rng: the random generators at the start of this epoch, and where it was resumed.
        fingerprint: identifies a run that can be resumed; None saves no state.
    """

    def __init__(
        self,
        settings: FinetuneSettings,
        classifier: Classifier,
        train: list[Example],
        dev: list[Example],
    ):
        self.settings, self.classifier = settings, classifier
        self.model, self.device = classifier.model, classifier.device
        self.train, self.dev_loader = train, classifier.loader(dev, settings.batch_size)
        self.n_batches = math.ceil(len(train) / settings.batch_size)
        self.steps_per_epoch = math.ceil(self.n_batches / settings.grad_accum)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.groups: list[dict[str, Any]] = [{"params": parameters, "lr": settings.lr}]
        self.method_state: dict[str, torch.Tensor] = {}
        self.method_constants: dict[str, torch.Tensor] = {}
        self.epoch, self.losses, self.seconds = 0, list[torch.Tensor](), 0.0
        self.best_dev_acc, self.best_epoch = -1.0, 0
        self.records: list[dict[str, Any]] = []
        self.rng: dict[str, torch.Tensor] = {}
        self.fingerprint: dict[str, Any] | None = None
        for method in settings.methods:
            method.before_training(self)
        self.optimizer = FastAdamW(self.groups, lr=settings.lr)
        if settings.is_advanced:
            n_trained, n_parameters = count_parameters(self.model)
            print(f"train {n_trained:,} of {n_parameters:,} parameters")

    @property
    def n_steps(self) -> int:
        """Optimizer steps of the whole training."""
        return self.settings.epochs * self.steps_per_epoch

    @property
    def step(self) -> int:
        """Optimizer steps taken so far."""
        return self.epoch * self.steps_per_epoch + len(self.losses)

    def log_probs(self, batch: Batch, model: Callable | None = None) -> torch.Tensor:
        """Log-probabilities of the labels, `(batch, num_labels)` in float32.

        Args:
            model: another model than the trained one.
        """
        lengths = None if batch.lengths is None else to_device(batch.lengths, self.device)
        with mixed_precision(self.device, self.classifier.dtype):
            return (model or self.model)(to_device(batch.token_ids, self.device), lengths)

    def remaining_batches(self) -> Iterator[Batch]:
        """Shuffle the examples; return the batches of this epoch that it has not been trained on.

        A resumed epoch is shuffled as at its start. The batches of the steps taken are skipped, and
        the random generators set to where the run was interrupted.
        """
        if self.losses:
            run.set_rng_state(self.rng, "at_start", self.device)
        else:
            self.rng = run.rng_state("at_start", self.device)
        batches = iter(self.classifier.loader(self.train, self.settings.batch_size, shuffle=True))
        if self.losses:
            for _ in range(len(self.losses) * self.settings.grad_accum):
                next(batches, None)  # the last step of an epoch may have fewer
            run.set_rng_state(self.rng, "now", self.device)
        return batches

    def end_epoch(self, **metrics: Any) -> None:
        """Record an epoch's metrics, begin the next epoch, and save the state."""
        record = {"option": "finetune", "epoch": self.epoch, **metrics}
        record["peak_memory_bytes"] = peak_memory(self.device)
        record["trained_parameters"] = count_parameters(self.model)[0]
        self.records.append(record)
        self.epoch, self.losses, self.seconds = self.epoch + 1, [], 0.0
        self.save()
        if distributed.is_rank0():
            append_metrics(self.settings.metrics_out, **record)

    def finish(self) -> None:
        """Load the best epoch's weights, let the methods act on them, and remove the state."""
        filepath = self.settings.filepath
        if self.best_epoch < self.epoch - 1:
            load_weights(self.model, read_checkpoint(filepath)["model"], filepath)
        changed = [method.after_training(self) for method in self.settings.methods]
        if any(changed):
            self.save_best(finished=True)
        if self.settings.is_advanced:
            print(f"peak memory {in_gibibytes(peak_memory(self.device))}")
        if self.fingerprint is not None:
            distributed.on_rank0(lambda: shutil.rmtree(self.folder, ignore_errors=True))

    # On disk

    @property
    def folder(self) -> Path:
        """The folder of the state."""
        return run.state_folder(self.settings.filepath, self.fingerprint or {})

    def start_or_resume(self, fingerprint: dict[str, Any] | None) -> None:
        """Restore the state of a run, or save its first one. None saves no state.

        Raises:
            InputError: the state is damaged, or the run's weights are gone.
        """
        self.fingerprint = fingerprint
        if fingerprint is None:
            return
        if self.settings.fresh:
            distributed.on_rank0(lambda: run.remove_states(self.folder))
        if not self.restore():
            self.save()
            return
        filepath = self.settings.filepath
        if self.epoch > 0 and not Path(filepath).is_file():
            raise InputError(f"{filepath}: the run's weights are gone; --fresh trains again")
        print(f"resuming from epoch {self.epoch}, step {len(self.losses)}", file=sys.stderr)
        path = self.settings.metrics_out
        if path is not None and distributed.is_rank0():
            written = lines_of(path) if Path(path).is_file() else []
            for record in self.records:
                if json.dumps(record) not in written:  # killed before it was
                    append_metrics(path, **record)

    def save(self) -> None:
        """Save the state of the run, if it can be resumed."""
        if self.fingerprint is None:
            return
        self.rng = self.rng or run.rng_state("at_start", self.device)
        values: dict[str, Any] = {name: getattr(self, name) for name in COUNTERS}
        values["losses"] = torch.stack(self.losses).tolist() if self.losses else []
        values |= {"step": self.step, "run": self.fingerprint}
        values |= {name: x for name, x in self.rng.items() if name.startswith("at_start.")}
        values |= {f"method.{name}": tensor for name, tensor in self.method_state.items()}
        run.save_state(self.folder, self.model, self.optimizer, values)

    def restore(self) -> bool:
        """Restore the state of the run; return whether it had one.

        Raises:
            InputError: the state is damaged, or another run's.
        """
        expected: dict[str, Any] = COUNTERS | {"at_start.cpu": torch.get_rng_state()}
        expected |= {f"method.{name}": tensor for name, tensor in self.method_state.items()}
        values = run.load_state(self.folder, self.model, self.optimizer, expected)
        if values is None:
            return False
        if values["run"] != self.fingerprint:
            raise InputError(f"{self.folder}: another run's; move it away")
        losses = values["losses"]
        is_valid = all(type(loss) is float for loss in losses)
        is_valid = is_valid and 0 <= values["epoch"] <= self.settings.epochs
        if not is_valid or len(losses) > self.steps_per_epoch:
            raise InputError(f"{self.folder}: not a state of this run; move it away")
        for name in COUNTERS:
            setattr(self, name, values[name])
        self.losses = [torch.tensor(loss, device=self.device) for loss in losses]
        self.rng = {name: x for name, x in values.items() if name.startswith(("at_start.", "now."))}
        with torch.no_grad():
            for name, tensor in self.method_state.items():
                tensor.copy_(values[f"method.{name}"])
        run.set_rng_state(self.rng, "now", self.device)
        return True

    def save_best(self, **more: Any) -> None:
        """Save the weights, with the settings that they were trained with."""
        settings, config = self.settings, self.classifier.config
        if self.fingerprint is not None:
            more["run"] = json.dumps(self.fingerprint)
        save_model(self.model, self.optimizer, settings, config, settings.filepath, **more)
