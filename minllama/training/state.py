"""The state of a training, whole on disk: one file, or with several processes a folder of parts.

One process writes `state.pt`. Several write `state-STEP/` together, a distributed checkpoint of
torch's. It is first written beside the last one and takes its name when it is whole. Any number of
processes goes on from either.
"""

import contextlib
import json
import math
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from minllama.checkpoints.layout import is_finite
from minllama.checkpoints.pt import read_checkpoint, write_checkpoint
from minllama.common.errors import InputError
from minllama.common.files import atomic_write, name_file_in_errors
from minllama.training import distributed

FILE, FOLDER, VALUES = "state.pt", "state-*", "values.json"
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
INDEX_CLASSES = {  # what the index of a distributed checkpoint is made of, besides dtypes
    *("pathlib.PosixPath", "pathlib.WindowsPath", "torch.Size", "torch.serialization._get_layout"),
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    *(
        f"torch.distributed.checkpoint.metadata.{name}"
        for name in (
            *("Metadata", "MetadataIndex", "StorageMeta", "BytesStorageMetadata"),
            *("TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata"),
            "_MEM_FORMAT_ENCODING",
        )
    ),
}


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors to save: all of them, or if some parameters are frozen, those that train."""
    if all(parameter.requires_grad for parameter in model.parameters()):
        return model.state_dict()
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def save(folder: Path, model: nn.Module, optimizer: Optimizer, values: dict[str, Any]) -> None:
    """Write the state in the place of the last one.

    Args:
        values: what else belongs to it: tensors and plain values, `step` among them.

    Raises:
        OSError: it could not be written; the last one remains.
    """
    if distributed.n_processes() == 1:
        saved = {"model": trained_state(model), "optimizer": optimizer.state_dict(), **values}
        write_checkpoint(saved, folder / FILE)
        _remove_others(folder, folder / FILE)
        return
    from torch.distributed import checkpoint

    distributed.keep_parts(model)
    tensors = _tensors(model, optimizer)
    tensors |= {key: x for key, x in values.items() if isinstance(x, torch.Tensor)}
    plain = {key: x for key, x in values.items() if not isinstance(x, torch.Tensor)}
    path = folder / FOLDER.replace("*", str(values["step"]))
    temporary = path.with_name(f".{path.name}.tmp")
    distributed.on_first(lambda: shutil.rmtree(temporary, ignore_errors=True))
    try:
        with warnings.catch_warnings(), _one_error(temporary):
            warnings.simplefilter("ignore")
            checkpoint.save(tensors, checkpoint_id=temporary)
    except OSError:
        if distributed.is_first():
            shutil.rmtree(temporary, ignore_errors=True)
        raise

    def finish() -> None:
        names = _names(model)
        steps = {names[p]: state["step"] for p, state in optimizer.state.items()}
        groups = [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]
        with atomic_write(temporary / VALUES) as file:
            json.dump({"values": plain, "groups": groups, "steps": steps}, file)
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
        _remove_others(folder, path)

    distributed.on_first(finish)


@contextlib.contextmanager
def _one_error(path: Path) -> Iterator[None]:
    """Raise what went wrong in one of the processes, as it was there.

    PyTorch raises the errors of all of them as one, which is no `Exception`.
    """
    from torch.distributed.checkpoint import CheckpointException

    with name_file_in_errors(path):
        try:
            yield
        except CheckpointException as error:
            cause, _ = next(iter(error.failures.values()))
            if "inline_container" in str(cause):  # PyTorch's zip files, of which a part is missing
                raise OSError(f"{path}: not whole; the disk may be full") from error
            raise cause from error


def load(
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer,
    schema: dict[str, Any],
    use: Callable[[dict[str, Any]], None],
) -> bool:
    """Take up the newest state that there is, whoever wrote it.

    Args:
        schema: of each of the values its type, or the tensor whose shape and type it has.
        use: takes up what `save` was given as `values`. What it trips over is in the file.

    Returns:
        whether there is a state.

    Raises:
        OSError: a file of it is gone.
        InputError: it is not a state of this training. Model and optimizer may be changed by then.
    """
    found = newest(folder)
    if found is None:
        return False
    try:
        if found.is_dir():
            with _one_error(found):
                values = _load_folder(found, model, optimizer)
        else:
            values = _load_file(found, model, optimizer)
        for key, expected in schema.items():
            _check(key, values[key], expected)
        if values["step"] < 0:
            raise ValueError(f"step {values['step']}")
        use(values)
    except (InputError, OSError, MemoryError):
        raise
    except Exception as error:  # whatever a reader trips over in a file that was edited
        text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"{found}: not a state of this run ({text}); move it away") from error
    return True


def _check(key: str, value: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        fits = isinstance(value, torch.Tensor) and value.shape == expected.shape
        fits = fits and value.dtype == expected.dtype
    else:
        fits = isinstance(value, expected) and not isinstance(value, bool)
        fits = fits and value == value  # no nan
    if not fits:
        raise TypeError(f"{key} is a {type(value).__name__} that cannot be one")


def newest(folder: Path) -> Path | None:
    """The state of the highest step, or None."""
    steps = {path: int(path.name.rpartition("-")[2]) for path in _folders(folder)}
    if (folder / FILE).is_file():
        if not steps:
            return folder / FILE
        step = read_checkpoint(folder / FILE, mapped=True).get("step")
        steps[folder / FILE] = step if isinstance(step, int) else -1
    return max(steps, key=steps.get, default=None)


def remove(folder: Path) -> None:
    """Remove every state."""
    _remove_others(folder, None)


def _folders(folder: Path) -> list[Path]:
    return [path for path in folder.glob(FOLDER) if path.name.rpartition("-")[2].isdecimal()]


def _remove_others(folder: Path, kept: Path | None) -> None:
    for path in _folders(folder):
        if path != kept:
            shutil.rmtree(path)
    if kept != folder / FILE:
        (folder / FILE).unlink(missing_ok=True)


def _names(model: nn.Module) -> dict[nn.Parameter, str]:
    """Of what trains."""
    return {p: name for name, p in model.named_parameters() if p.requires_grad}


def _tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """The weights, and the optimizer's moments by the weights' names."""
    names = _names(model)
    tensors = {f"model.{name}": parameter for parameter, name in names.items()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{names[parameter]}.{key}"] = value
    return tensors


def _load_file(path: Path, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    saved = read_checkpoint(path)
    expected, trained = trained_state(model), dict(model.named_parameters())
    if saved["model"].keys() != expected.keys():
        raise InputError(f"{path}: its tensors are not those that the run trains; move it away")
    for name, tensor in expected.items():
        _check_weight(name, saved["model"][name], tensor)
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = {order[i]: values for i, values in saved["optimizer"]["state"].items()}
    for parameter, values in states.items():
        _check_step(values["step"])
        for key in MOMENTS:
            _check_weight(key, values[key], parameter)
    if any(hasattr(tensor, "device_mesh") for tensor in expected.values()):
        with torch.no_grad():
            for name, parameter in trained.items():
                if parameter.requires_grad:
                    parameter.copy_(_like(saved["model"][name], parameter))
    else:
        model.load_state_dict(saved["model"], strict=False)
    for parameter, values in states.items():
        moments = {key: _like(values[key], parameter) for key in MOMENTS}
        optimizer.state[parameter] = {"step": values["step"], **moments}
    _set_groups(optimizer, saved["optimizer"]["param_groups"])
    return {key: x for key, x in saved.items() if key not in ("model", "optimizer")}


def _check_step(step: Any) -> None:
    _check("step", step, int)
    if step < 0:
        raise ValueError(f"step {step}")


def _check_weight(name: str, tensor: Any, like: torch.Tensor) -> None:
    if not isinstance(tensor, torch.Tensor) or tensor.shape != like.shape:
        raise TypeError(f"{name} is not of shape {tuple(like.shape)}")
    if not tensor.dtype.is_floating_point or not is_finite(tensor):
        raise ValueError(f"{name} has values that are not finite numbers")


def _like(tensor: torch.Tensor, parameter: Any) -> torch.Tensor:
    """A tensor where a parameter is: on its device, or spread over the processes as it is."""
    if not hasattr(parameter, "device_mesh"):
        return tensor.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)  # all have it whole


def _load_folder(path: Path, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    from torch.distributed import checkpoint

    saved = json.loads((path / VALUES).read_bytes())
    reader = _reader(path)
    names = _names(model)
    for parameter, name in names.items():
        if name in saved["steps"]:
            _check_step(saved["steps"][name])
            moments = {key: torch.zeros_like(parameter) for key in MOMENTS}
            optimizer.state[parameter] = {"step": saved["steps"][name], **moments}
    tensors = _tensors(model, optimizer)
    more = {
        key: torch.empty(stored.size, dtype=stored.properties.dtype)
        for key, stored in reader.read_metadata().state_dict_metadata.items()
        if not key.startswith(("model.", "optimizer."))
    }
    with warnings.catch_warnings():  # that there is one process
        warnings.simplefilter("ignore")
        checkpoint.load(tensors | more, storage_reader=reader)
    _set_groups(optimizer, saved["groups"])
    return saved["values"] | more


def _reader(path: Path) -> Any:
    """What reads a distributed checkpoint, its index too, without running code from it."""
    from torch.distributed.checkpoint import FileSystemReader

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            with (path / ".metadata").open("rb") as file:
                metadata = _IndexUnpickler(file).load()
            metadata.storage_meta.load_id = self.load_id
            return metadata

    return Reader(path)


class _IndexUnpickler(pickle.Unpickler):
    """Reads the index of a distributed checkpoint, and nothing but its plain classes."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if f"{module}.{name}" not in INDEX_CLASSES and not is_dtype:
            raise InputError(f"the index of a checkpoint names {module}.{name}; not one of ours")
        return super().find_class(module, name)


def _set_groups(optimizer: Optimizer, groups: list[dict]) -> None:
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        for key, value in saved.items():
            if key == "params":
                continue
            value = type(group[key])(value)
            # All but the rate is as the settings say, and stays so.
            if not 0 <= value < math.inf if key == "lr" else value != group[key]:
                raise ValueError(f"{key} {value}")
            group[key] = value
