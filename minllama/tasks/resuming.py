"""A fine-tuning run that goes on: whose weights a file holds, and how far the training was.

A run is known by a fingerprint of its settings and data. It is kept with the best weights. Beside
them lies the state of the training, after every epoch, until the run has ended.
"""

import contextlib
import hashlib
import io
import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from minllama.checkpoints.pt import read_checkpoint, write_checkpoint
from minllama.common.errors import InputError
from minllama.evaluation.classification import append_metrics
from minllama.training import distributed, state
from minllama.training.folder import locked

RUN, LOG, RECORDS = "run", "log", "records"  # keys in a file of weights; the last two at the end
DIGITS = (8, 16, 64)  # of the fingerprint, in a name


@dataclass(frozen=True)
class Claim:
    """A run's hold on its files.

    Attributes:
        filepath: where its best weights are kept.
        fingerprint: all that its result depends on, as JSON has it.
        fresh: whether it begins anew, whatever is there.
    """

    filepath: str
    fingerprint: dict[str, Any]
    fresh: bool

    @property
    def state_folder(self) -> Path:
        name = f"finetune-{digest(self.fingerprint)[: DIGITS[0]]}.state"
        return Path(self.filepath).with_name(name)


def digest(fingerprint: dict[str, Any]) -> str:
    """The SHA-256 of a fingerprint, as hexadecimal digits."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def claimed(filepath: str, fingerprint: dict[str, Any], data: str, fresh: bool) -> Iterator[Claim]:
    """Hold the file of a run's best weights against all other runs.

    A file with this run's weights is taken up again. One with another's, or of which nobody knows,
    is left alone: this run then keeps its weights under a longer name, and says so.

    Args:
        filepath: the name that is wanted.
        data: the data's name, for the longer one.

    Raises:
        InputError: another process is at this very run.
    """
    with contextlib.ExitStack() as held:
        chosen = filepath
        if distributed.is_first():
            own = Path(filepath).with_name(f".finetune-{digest(fingerprint)[: DIGITS[0]]}.lock")
            try:
                held.enter_context(locked(own))
            except TimeoutError:
                raise InputError(f"{filepath}: another process is at this very run") from None
            chosen = _choose(filepath, fingerprint, data, held)
        chosen = distributed.gathered_objects(chosen)[0]
        if chosen != filepath:
            print(f"{filepath}: another run's; this one's weights: {chosen}", file=sys.stderr)
        yield Claim(chosen, fingerprint, fresh)


def _choose(filepath: str, fingerprint: dict, data: str, held: contextlib.ExitStack) -> str:
    path = Path(filepath)
    paths = [path]
    for n in DIGITS:
        longer = f"{path.stem}-{re.sub(r'[^-.A-Za-z0-9_]', '_', data)}-{digest(fingerprint)[:n]}.pt"
        paths.append(path.with_name(longer))
    own = [path for path in paths if owner(path) == fingerprint]
    free = [path for path in paths if not path.exists() and not path.is_symlink()]
    for path in own + free:
        with contextlib.suppress(TimeoutError):
            held.enter_context(locked(path.with_name(f".{path.name}.lock")))
            return str(path)
    raise InputError(f"{paths[-1]}: another run's; name another folder to work in")


def owner(path: Path) -> dict[str, Any] | None:
    """The fingerprint of the run whose weights a file holds, if it tells."""
    if not path.is_file():
        return None
    try:
        told = read_checkpoint(path, mapped=True).get(RUN)
        return json.loads(told) if isinstance(told, str) else None
    except (InputError, ValueError, RecursionError):
        return None


@dataclass
class Progress:
    """How far a training is.

    Attributes:
        epoch: how many are done.
        best_dev_acc, best_epoch: of those.
        losses: of the steps of the epoch that is not done.
        seconds: that these took.
        at_start, now: the states of the generators, at that epoch's start and behind these steps.
        log: what was printed.
        records: the lines of metrics.
    """

    epoch: int = 0
    best_dev_acc: float = -1.0
    best_epoch: int = 0
    losses: list[torch.Tensor] = field(default_factory=list)
    seconds: float = 0.0
    at_start: dict[str, torch.Tensor] = field(default_factory=dict)
    now: dict[str, torch.Tensor] = field(default_factory=dict)
    log: str = ""
    records: list[dict] = field(default_factory=list)

    PLAIN = ("epoch", "best_dev_acc", "best_epoch", "seconds", "log", "records")  # attributes


def generator_states(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of the CPU's generator and of the device's."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state()
    return states


def restore_generators(states: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if "device" in states and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states["device"])


class Keeper:
    """Keeps the state of a training beside its weights; without a claim it keeps nothing.

    Args:
        kept: tensors of methods that belong to the state.
    """

    def __init__(
        self,
        claim: Claim | None,
        model: nn.Module,
        optimizer: Optimizer,
        kept: dict[str, torch.Tensor],
    ):
        self.claim, self.model, self.optimizer, self.kept = claim, model, optimizer, kept

    def load(self, n_epochs: int, n_steps: int) -> Progress:
        """Where the training was; the model, the optimizer and the generators are as they were.

        Args:
            n_epochs, n_steps: how far it can be: epochs, and steps in one of them.
        """
        progress = Progress()
        if self.claim is None:
            return progress
        if self.claim.fresh:
            distributed.on_first(self._remove)
            return progress
        types = (int, float, int, (int, float), str, list)
        schema: dict[str, Any] = dict(zip(Progress.PLAIN, types, strict=True))
        schema |= {"step": int, "run": dict, "losses": list, "now.cpu": torch.get_rng_state()}
        schema |= {f"method.{name}": tensor for name, tensor in self.kept.items()}
        schema["at_start.cpu"] = schema["now.cpu"]

        def use(saved: dict[str, Any]) -> None:
            self._take_up(saved, progress)
            if not 0 <= progress.epoch <= n_epochs or len(progress.losses) > n_steps:
                raise ValueError(f"epoch {progress.epoch}, step {len(progress.losses)}")

        folder = self.claim.state_folder
        if state.load(folder, self.model, self.optimizer, schema, use):
            step = len(progress.losses)
            print(f"continuing from epoch {progress.epoch}, step {step}", file=sys.stderr)
        return progress

    def _take_up(self, saved: dict[str, Any], progress: Progress) -> None:
        if saved["run"] != self.claim.fingerprint:
            raise InputError(f"{self.claim.state_folder}: another run's; move it away")
        for name in Progress.PLAIN:
            setattr(progress, name, saved[name])
        if not all(type(loss) is float for loss in saved["losses"]):
            raise TypeError("a loss that is no number")
        device = next(self.model.parameters()).device
        progress.losses = [torch.tensor(loss, device=device) for loss in saved["losses"]]
        for moment in ("at_start", "now"):
            states = {key: saved.get(f"{moment}.{key}") for key in ("cpu", "device")}
            setattr(progress, moment, {key: x for key, x in states.items() if x is not None})
        with torch.no_grad():
            for name, tensor in self.kept.items():
                tensor.copy_(saved[f"method.{name}"])
        json.dumps(progress.records)  # so that they can be written again
        for states in (progress.at_start, progress.now):
            restore_generators(states, device)

    def save(self, progress: Progress, n_steps: int) -> None:
        """Write the state.

        Args:
            n_steps: taken so far, in all epochs.
        """
        if self.claim is None:
            return
        progress.now = generator_states(next(self.model.parameters()).device)
        values: dict[str, Any] = {name: getattr(progress, name) for name in Progress.PLAIN}
        values |= {"step": n_steps, "run": self.claim.fingerprint}
        values["losses"] = torch.stack(progress.losses).tolist() if progress.losses else []
        values |= {f"at_start.{key}": tensor for key, tensor in progress.at_start.items()}
        values |= {f"now.{key}": tensor for key, tensor in progress.now.items()}
        values |= {f"method.{name}": tensor for name, tensor in self.kept.items()}
        distributed.on_first(lambda: self.claim.state_folder.mkdir(exist_ok=True))
        state.save(self.claim.state_folder, self.model, self.optimizer, values)

    def ended(self) -> tuple[str, list[dict]] | None:
        """What a run that has ended printed, and its lines of metrics."""
        if self.claim is None or self.claim.fresh or not Path(self.claim.filepath).is_file():
            return None
        saved = read_checkpoint(self.claim.filepath, mapped=True)
        if LOG not in saved:
            return None
        try:
            log, records = saved[LOG], json.loads(saved[RECORDS])
            if not isinstance(log, str) or not all(isinstance(each, dict) for each in records):
                raise TypeError
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise InputError(
                f"{self.claim.filepath}: what its run printed is damaged; --fresh trains anew"
            ) from error
        distributed.on_first(self._remove)  # it may have been killed before it did this
        return log, records

    def end(self, progress: Progress, weights: dict | None) -> None:
        """Keep with the weights that the run has ended, and remove its state.

        Args:
            weights: what to save in the place of the best epoch's, or None.
        """
        if self.claim is None:
            return

        def finish() -> None:
            saved = read_checkpoint(self.claim.filepath) if weights is None else weights
            saved |= {LOG: progress.log, RECORDS: json.dumps(progress.records)}
            write_checkpoint(saved, self.claim.filepath)
            self._remove()

        distributed.on_first(finish)

    def _remove(self) -> None:
        shutil.rmtree(self.claim.state_folder, ignore_errors=True)


class Recorder(io.TextIOBase):
    """Standard output, which is kept with the progress too."""

    def __init__(self, progress: Progress):
        self.progress, self.stdout = progress, sys.stdout

    def write(self, text: str) -> int:
        self.progress.log += text
        return self.stdout.write(text)

    def flush(self) -> None:
        self.stdout.flush()


def add_records(path: str | Path | None, records: list[dict]) -> None:
    """Add to a file of metrics those lines that it does not have."""
    if path is None:
        return
    there = Path(path).read_text(encoding="utf-8").splitlines() if Path(path).is_file() else []
    for record in records:
        if json.dumps(record) not in there:
            append_metrics(path, **record)
