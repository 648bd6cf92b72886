"""A training run on disk: its fingerprint, its lock, its state.

A run is known by its fingerprint: the settings and files that its result depends on. One process
holds its lock. Its state is everything that it needs to resume: the weights that train, the
optimizer, random generators and counters. Both training loops use this module.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import nn
from torch.optim import Optimizer

from minllama.checkpoints.pt import read_checkpoint, write_checkpoint
from minllama.common.errors import InputError
from minllama.training import distributed, version_0_2

STATE = "state.pt"
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


def digest(fingerprint: dict[str, Any]) -> str:
    """The SHA-256 of a fingerprint, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def lock(path: Path, message: str) -> Iterator[None]:
    """Hold a lock file. The system releases it however the process ends.

    Raises:
        InputError: another process holds it; with this message.
    """
    try:
        held = FileLock(path).acquire(blocking=False)
    except Timeout:
        raise InputError(message) from None
    with held:
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows removes it on release
                path.unlink()


# Fine-tuning: a file of best weights, and a folder with the state beside it


@contextlib.contextmanager
def lock_weights_path(filepath: str, fingerprint: dict[str, Any], data: str) -> Iterator[str]:
    """Choose and lock the file for a run's best weights; yield its name.

    If the file belongs to another run, it stays as it is, and this run's name also has the data's
    name and a digest.

    Args:
        filepath: the name that is wanted.
        data: the data's name.

    Raises:
        InputError: another process works on the same run.
    """
    short_digest = digest(fingerprint)[:8]
    wanted = Path(filepath)
    long_name = wanted.with_name(f"{wanted.stem}-{data}-{short_digest}.pt")
    with contextlib.ExitStack() as locks:
        chosen = wanted
        if distributed.is_rank0():
            own_lock = wanted.with_name(f".finetune-{short_digest}.lock")
            locks.enter_context(lock(own_lock, f"{filepath}: another process is training this run"))
            is_free = not wanted.exists() and not wanted.is_symlink()
            is_own = saved_fingerprint(wanted) == fingerprint
            if saved_fingerprint(long_name) == fingerprint or not (is_free or is_own):
                chosen = long_name
            else:
                try:
                    locks.enter_context(lock(wanted.with_name(f".{wanted.name}.lock"), filepath))
                except InputError:  # another run that has not saved its weights yet
                    chosen = long_name
            if chosen.exists() and saved_fingerprint(chosen) != fingerprint:
                raise InputError(f"{chosen}: belongs to another run; move it away")
        chosen = distributed.all_gather(chosen)[0]
        yield str(chosen)


def saved_fingerprint(path: Path) -> dict[str, Any] | None:
    """The fingerprint of the run that saved a file of weights, or None."""
    if not path.is_file():
        return None
    try:
        return json.loads(read_checkpoint(path, mapped=True)["run"])
    except (InputError, KeyError, TypeError, ValueError, RecursionError):
        return None


def state_folder(filepath: str, fingerprint: dict[str, Any]) -> Path:
    """The folder of a fine-tuning run's state, beside its weights."""
    return Path(filepath).with_name(f"finetune-{digest(fingerprint)[:8]}.state")


def is_finished(filepath: str, fingerprint: dict[str, Any]) -> bool:
    """Whether a run has saved its final weights. Until it has, it also has a state."""
    if not Path(filepath).is_file():
        return False
    folder = state_folder(filepath, fingerprint)
    if newest_state(folder) is not None:
        saved = read_checkpoint(filepath, mapped=True)
        if "finished" not in saved and "log" not in saved:  # a log in version 0.2
            return False
    distributed.on_rank0(lambda: shutil.rmtree(folder, ignore_errors=True))
    return True


# The state


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors to save: all of a model's, or where some are frozen, those that train."""
    parameters = dict(model.named_parameters())
    if all(parameter.requires_grad for parameter in parameters.values()):
        return model.state_dict()
    return {name: p.detach() for name, p in parameters.items() if p.requires_grad}


def rng_state(name: str, device: torch.device) -> dict[str, torch.Tensor]:
    """The states of the CPU's random generator and of the device's, under keys of this name."""
    states = {f"{name}.cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[f"{name}.device"] = torch.get_device_module(device).get_rng_state()
    return states


def set_rng_state(values: dict[str, Any], name: str, device: torch.device) -> None:
    """Restore the states that `rng_state` returned."""
    torch.set_rng_state(values[f"{name}.cpu"])
    if f"{name}.device" in values and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(values[f"{name}.device"])


def save_state(folder: Path, model: nn.Module, optimizer: Optimizer, values: dict) -> None:
    """Write the state in place of the last one, atomically.

    The states of the random generators are saved too, as "now".

    Args:
        values: counters and tensors of the run: `step`, `run` (its fingerprint), and others.

    Raises:
        OSError: it could not be written; the last state remains.
    """
    distributed.reshard(model)
    state = {
        "model": distributed.full_tensors(trained_tensors(model)),
        "optimizer": distributed.full_tensors(optimizer.state_dict()),
        **values,
        **rng_state("now", next(model.parameters()).device),
    }

    def write() -> None:
        folder.mkdir(exist_ok=True)
        write_checkpoint(state, folder / STATE)
        for former in version_0_2.find_folders(folder):
            shutil.rmtree(former)

    distributed.on_rank0(write)


def load_state(
    folder: Path, model: nn.Module, optimizer: Optimizer, expected: dict[str, Any]
) -> dict[str, Any] | None:
    """Load the newest state into a model and its optimizer.

    Args:
        expected: the type of each value, or a tensor of its shape and type.

    Returns:
        the values that `save_state` saved; None if the folder has no state.

    Raises:
        InputError: the file is not a state of this run. Model and optimizer may have changed.
    """
    path = distributed.all_gather(newest_state(folder))[0]  # before one of them saves a new one
    if path is None:
        return None
    expected = expected | {"step": int, "run": dict, "now.cpu": torch.get_rng_state()}
    try:
        if path.is_dir():
            state = version_0_2.read_folder(path, model, optimizer)
        else:
            state = read_checkpoint(path)
        state = {version_0_2.NAMES.get(name, name): value for name, value in state.items()}
        for name, like in expected.items():
            _check_value(name, state[name], like)
            if name.endswith(".cpu"):
                torch.Generator().set_state(state[name])  # an error if it is not one
        weights, moments = state.pop("model"), state.pop("optimizer")
        if weights.keys() != trained_tensors(model).keys():
            raise ValueError("its tensors are not those that the run trains")
        _load_weights(model, weights)
        _load_optimizer(optimizer, moments)
    except (InputError, OSError, MemoryError):
        raise
    except Exception as error:  # an edited file may fail anywhere
        text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"{path}: not a state of this run ({text}); move it away") from error
    return state


def newest_state(folder: Path) -> Path | None:
    """The state in a folder, or None."""
    if (folder / STATE).is_file():
        return folder / STATE
    folders = version_0_2.find_folders(folder)
    return max(folders, key=lambda path: folders[path], default=None)


def remove_states(folder: Path) -> None:
    """Remove every state from a folder."""
    (folder / STATE).unlink(missing_ok=True)
    for path in version_0_2.find_folders(folder):
        shutil.rmtree(path)


def _load_weights(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in trained_tensors(model).items():
            parameter.copy_(like_parameter(weights[name], parameter))


def _load_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, moments in saved["state"].items():
        parameter, step = parameters[index], int(moments["step"])
        if step < 0:
            raise ValueError(f"step {step}")
        tensors = {key: like_parameter(moments[key], parameter) for key in MOMENTS}
        optimizer.state[parameter] = {"step": step, **tensors}
    for group, saved_group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group["lr"] = float(saved_group["lr"])  # a schedule may have changed it; the rest is flags


def _check_value(name: str, value: Any, like: Any) -> None:
    if isinstance(like, torch.Tensor):
        fits = isinstance(value, torch.Tensor)
        fits = fits and (value.shape, value.dtype) == (like.shape, like.dtype)
    else:
        fits = isinstance(value, like) and not (like is int and value < 0)
    if not fits:
        raise TypeError(f"{name} is a {type(value).__name__} of another kind")


def like_parameter(tensor: torch.Tensor, parameter: Any) -> torch.Tensor:
    """Move a whole tensor to a parameter's device, sharded as the parameter is.

    Raises:
        ValueError: it has another shape.
    """
    if tensor.shape != parameter.shape:
        raise ValueError(f"a tensor is not of shape {tuple(parameter.shape)}")
    tensor = tensor.to(parameter.device, parameter.dtype)
    if not hasattr(parameter, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)
