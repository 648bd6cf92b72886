"""The state of a sharded run: a distributed checkpoint of torch's, in a folder `state-STEP`."""

import contextlib
import json
import pickle
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from minllama.common.errors import InputError
from minllama.common.files import atomic_write, name_file_in_errors
from minllama.training import distributed
from minllama.training.optimizer_state import MOMENTS, check_step, set_groups

VALUES = "values.json"
INDEX_CLASSES = {  # the classes in the index of a distributed checkpoint, besides dtypes
    *("pathlib.PosixPath", "pathlib.WindowsPath", "torch.Size", "torch.serialization._get_layout"),
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.distributed.checkpoint.metadata.Metadata",
    "torch.distributed.checkpoint.metadata.MetadataIndex",
    "torch.distributed.checkpoint.metadata.StorageMeta",
    "torch.distributed.checkpoint.metadata.BytesStorageMetadata",
    "torch.distributed.checkpoint.metadata.TensorStorageMetadata",
    "torch.distributed.checkpoint.metadata.TensorProperties",
    "torch.distributed.checkpoint.metadata.ChunkStorageMetadata",
    "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
}


def find(folder: Path) -> dict[Path, int]:
    """The states in a folder, each with its number of steps."""
    paths = [path for path in folder.glob("state-*") if path.name[6:].isdecimal()]
    return {path: int(path.name[6:]) for path in paths}


def save(folder: Path, model: nn.Module, optimizer: Optimizer, values: dict) -> Path:
    """Write a state, under another name until it is whole. All processes call it.

    Raises:
        OSError: it could not be written; nothing of it remains.
    """
    from torch.distributed import checkpoint

    distributed.reshard(model)
    tensors = _tensors(model, optimizer)
    tensors |= {key: x for key, x in values.items() if isinstance(x, torch.Tensor)}
    plain = {key: x for key, x in values.items() if not isinstance(x, torch.Tensor)}
    path = folder / f"state-{values['step']}"
    temporary = path.with_name(f".{path.name}.tmp")
    distributed.on_rank0(lambda: shutil.rmtree(temporary, ignore_errors=True))
    try:
        with warnings.catch_warnings(), _first_error(temporary):
            warnings.simplefilter("ignore")
            checkpoint.save(tensors, checkpoint_id=temporary)
    except OSError:
        if distributed.is_rank0():
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

    distributed.on_rank0(finish)
    return path


def load(path: Path, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Load a state, in any number of processes, sharded or not; return its values."""
    from torch.distributed import checkpoint

    with _first_error(path):
        saved = json.loads((path / VALUES).read_bytes())
        reader = safe_reader(path)
        for parameter, name in _names(model).items():
            if name in saved["steps"]:
                check_step(saved["steps"][name])
                moments = {key: torch.zeros_like(parameter) for key in MOMENTS}
                optimizer.state[parameter] = {"step": saved["steps"][name], **moments}
        values = {
            key: torch.empty(stored.size, dtype=stored.properties.dtype)
            for key, stored in reader.read_metadata().state_dict_metadata.items()
            if not key.startswith(("model.", "optimizer."))
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # in one process
            checkpoint.load(_tensors(model, optimizer) | values, storage_reader=reader)
    set_groups(optimizer, saved["groups"])
    return saved["values"] | values


def _names(model: nn.Module) -> dict[nn.Parameter, str]:
    """The parameters that train, with their names."""
    return {p: name for name, p in model.named_parameters() if p.requires_grad}


def _tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """The weights that train, and the optimizer's moments by the weights' names."""
    names = _names(model)
    tensors: dict[str, torch.Tensor] = {f"model.{name}": p for p, name in names.items()}
    for parameter, state in optimizer.state.items():
        for key in MOMENTS:
            tensors[f"optimizer.{names[parameter]}.{key}"] = state[key]
    return tensors


@contextlib.contextmanager
def _first_error(path: Path) -> Iterator[None]:
    """Raise the first process's error in place of PyTorch's collection, which is no Exception."""
    from torch.distributed.checkpoint import CheckpointException

    with name_file_in_errors(path):
        try:
            yield
        except CheckpointException as error:
            cause, _ = next(iter(error.failures.values()))
            if "inline_container" in str(cause):  # an incomplete zip file
                raise OSError(f"{path}: not whole; the disk may be full") from error
            raise cause from error


def safe_reader(path: Path) -> Any:
    """A reader of distributed checkpoints that runs no code from their index."""
    from torch.distributed.checkpoint import FileSystemReader

    class SafeReader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            with (path / ".metadata").open("rb") as file:
                metadata = IndexUnpickler(file).load()
            metadata.storage_meta.load_id = self.load_id
            return metadata

    return SafeReader(path)


class IndexUnpickler(pickle.Unpickler):
    """Reads the index of a distributed checkpoint, which has plain classes only."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if f"{module}.{name}" not in INDEX_CLASSES and not is_dtype:
            raise InputError(f"the index of a checkpoint names {module}.{name}; not one of ours")
        return super().find_class(module, name)
