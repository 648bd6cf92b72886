"""The folder of a pre-training run: one process at a time, one set of settings, whole files."""

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.optim import Optimizer

from llama import Llama
from minllama.checkpoints.layout import build_checkpoint
from minllama.checkpoints.pt import load, model_args_of, write_checkpoint
from minllama.common.errors import InputError
from minllama.common.files import atomic_write, remove_leftovers
from minllama.text import corpus
from minllama.training import distributed, run

MODEL, METRICS, SETTINGS = "model.pt", "metrics.jsonl", "pretrain.json"
TOKENIZER, TOKENS, LOCK = "tokenizer.model", "tokens", ".lock"
FILES = [MODEL, METRICS, SETTINGS, TOKENIZER, run.STATE]
FILES += [f"{TOKENS}/{name}" for name in (corpus.INDEX, *corpus.FILES)]


class RunFolder:
    """The folder of a pre-training run.

    Args:
        path: the folder, which need not exist.
        fingerprint: the settings and files that the result of the run depends on.
        is_continuation: whether a run with another fingerprint may be continued as this one.

    Attributes:
        model, metrics, tokenizer, tokens: paths of its files and of the folder of token ids.
    """

    def __init__(
        self,
        path: str | Path,
        fingerprint: dict[str, Any],
        is_continuation: Callable[[dict[str, Any]], bool],
    ):
        self.path, self.fingerprint = Path(path), fingerprint
        self.is_continuation = is_continuation
        self.model, self.metrics = self.path / MODEL, self.path / METRICS
        self.tokenizer, self.tokens = self.path / TOKENIZER, self.path / TOKENS

    @contextlib.contextmanager
    def open(self, inputs: Iterable[str | Path]) -> Iterator[None]:
        """Hold the folder on rank 0, a new one or one that is resumed, against other processes.

        Until its first report a run may be started again with other settings. An error before that
        leaves the folder empty.

        Args:
            inputs: files that the run reads. They must not be in a folder that is cleared.

        Raises:
            InputError: it has another run or other files, or another process trains there.
        """
        if not distributed.is_rank0():
            yield
            return
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path}: not a folder; name another --output_dir")
        is_new = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with run.lock(self.path / LOCK, f"{self.path}: another process is training there"):
                self._prepare(inputs)
                try:
                    yield
                except Exception:
                    if not self.has_state():
                        self._clear()
                    raise
        finally:
            if is_new:
                with contextlib.suppress(OSError):  # it is not empty
                    self.path.rmdir()

    def _prepare(self, inputs: Iterable[str | Path]) -> None:
        """Check that this run may use the folder, clear it of another one, save the settings."""
        for name in FILES:
            remove_leftovers(self.path / name)
        before = self._fingerprint_before()
        is_same = before in (None, self.fingerprint) or self.is_continuation(before)
        has_reports = self.metrics.is_file() and self.metrics.stat().st_size > 0
        has_results = has_reports or self.model.is_file()
        if has_results and not self.has_state():
            raise InputError(
                f"{self.path}: holds a trained model or reports, but no {run.STATE} to continue "
                "from; name another --output_dir"
            )
        if has_results and not is_same:
            self._refuse(before)
        if not is_same or not self.has_state():
            for path in inputs:
                if Path(path).resolve().is_relative_to(self.path.resolve()):
                    raise InputError(
                        f"{path}: a file of the run in {self.path}; name another --output_dir"
                    )
        if not is_same:
            self._clear()
        with atomic_write(self.path / SETTINGS) as file:
            json.dump(self.fingerprint, file, indent=1)

    def has_state(self) -> bool:
        """Whether the run has saved a state."""
        return run.newest_state(self.path) is not None

    def _fingerprint_before(self) -> Any:
        """The fingerprint of the run in the folder, or None if the folder is empty."""
        settings = self.path / SETTINGS
        if not settings.exists():
            if any(path.name != LOCK for path in self.path.iterdir()):
                raise InputError(
                    f"{self.path}: holds other files; name an empty or a new --output_dir"
                )
            return None
        try:
            before = json.loads(settings.read_bytes())
        except (ValueError, RecursionError):
            before = None
        if not isinstance(before, dict) or before.keys() != self.fingerprint.keys():
            raise InputError(f"{settings}: not the settings of a run; name another --output_dir")
        return before

    def _refuse(self, before: dict[str, Any]) -> NoReturn:
        """Refuse to continue a run with other settings, naming them."""
        changes = [
            f"{name} was {before[name]}, is {value}"
            for name, value in self.fingerprint.items()
            if before[name] != value
        ]
        hint = ""
        if len(changes) == 1 and self.fingerprint["steps"] != before["steps"]:
            hint = " (--steps can be raised only at a constant rate: --min_lr equal to --lr)"
        raise InputError(
            f"{self.path}: holds a run with other settings ({'; '.join(changes)}); "
            f"give the same ones to continue it, or another --output_dir{hint}"
        )

    def _clear(self) -> None:
        for name in (SETTINGS, METRICS, TOKENIZER):
            (self.path / name).unlink(missing_ok=True)
        run.remove_states(self.path)
        shutil.rmtree(self.tokens, ignore_errors=True)

    # While it trains

    def start_or_resume(self, llama: Llama, optimizer: Optimizer) -> tuple[int, float, float]:
        """Restore the state, or save a first one: no model is ever without a state.

        Returns:
            the steps taken, the best loss so far, and the seconds spent on them.

        Raises:
            InputError: the state is damaged, or another run's.
        """
        expected = {"best_loss": float, "seconds": (int, float)}
        values = run.load_state(self.path, llama, optimizer, expected)
        if values is None:
            self.save_state(llama, optimizer, 0, math.inf, 0.0)
            return 0, math.inf, 0.0
        step = values["step"]
        if values["run"] != self.fingerprint and not self.is_continuation(values["run"]):
            found = run.newest_state(self.path)
            raise InputError(f"{found}: not this run's; name another --output_dir")
        if step > 0 and not self.model.is_file():
            raise InputError(f"{self.path}: {MODEL} is missing; name another --output_dir")
        run.set_rng_state(values, "now", next(llama.parameters()).device)
        distributed.on_rank0(lambda: truncate_metrics(self.metrics, step))
        print(f"resuming from step {step} in {self.path}")
        return step, values["best_loss"], values["seconds"]

    def save_state(
        self, llama: Llama, optimizer: Optimizer, step: int, best_loss: float, seconds: float
    ) -> None:
        """Save the state from which the run is resumed."""
        values = {"step": step, "best_loss": best_loss, "seconds": seconds}
        run.save_state(self.path, llama, optimizer, values | {"run": self.fingerprint})

    def save_model(self, llama: Llama, dtype: str, step: int, best_loss: float) -> None:
        """Save the weights in the layout of `stories42M.pt`."""
        weights = distributed.full_tensors(llama.state_dict())
        if not distributed.is_rank0():
            return
        torch_dtype = getattr(torch, dtype)
        weights = {name: x.detach().to("cpu", torch_dtype) for name, x in weights.items()}
        if llama.config.tie_embeddings:  # stored once
            weights["tok_embeddings.weight"] = weights["output.weight"]
        saved = {
            "model": weights,
            "model_args": model_args_of(llama.config),
            "iter_num": step,
            "best_val_loss": torch.tensor(best_loss),
            "config": self.fingerprint,
        }
        write_checkpoint(saved, self.model)

    def load_model(self, llama: Llama) -> None:
        """Load the weights that `save_model` saved.

        Raises:
            InputError: the file was replaced by another one.
        """
        weights = load(self.model).tensors
        build_checkpoint(llama.config, weights, self.model, llama.config.tie_embeddings)
        with torch.no_grad():
            for name, tensor in llama.state_dict().items():
                tensor.copy_(run.like_parameter(weights[name], tensor))


def truncate_metrics(path: Path, step: int) -> None:
    """Drop the reports after a step, which will come again, and incomplete lines."""
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    with atomic_write(path) as file:
        for line in lines:
            with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
                if json.loads(line)["step"] <= step:
                    file.write(f"{line}\n")
