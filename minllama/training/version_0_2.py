"""The states that version 0.2 wrote in several processes: distributed checkpoints of torch's."""

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from minllama.common.errors import InputError

NAMES = {"settings": "run", "torch_rng": "now.cpu", "device_rng": "now.device"}  # then and now
METADATA = "torch.distributed.checkpoint.metadata"
INDEX_CLASSES = {  # the plain classes in the index of such a checkpoint, besides dtypes
    "pathlib.PosixPath", "pathlib.WindowsPath", "torch.Size", "torch.serialization._get_layout",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    f"{METADATA}.Metadata", f"{METADATA}.MetadataIndex", f"{METADATA}.StorageMeta",
    f"{METADATA}.BytesStorageMetadata", f"{METADATA}.TensorStorageMetadata",
    f"{METADATA}.TensorProperties", f"{METADATA}.ChunkStorageMetadata",
    f"{METADATA}._MEM_FORMAT_ENCODING",
}  # fmt: skip


def find_folders(folder: Path) -> dict[Path, int]:
    """The states in a run's folder, with their numbers of steps."""
    paths = [path for path in folder.glob("state-*") if path.name[6:].isdecimal()]
    return {path: int(path.name[6:]) for path in paths}


def read_folder(path: Path, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Read a state as `state.pt` has it, without running code from it."""
    from torch.distributed import checkpoint

    names = {parameter: name for name, parameter in model.named_parameters()}
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    saved = json.loads((path / "values.json").read_bytes())
    with (path / ".metadata").open("rb") as file:
        metadata = IndexUnpickler(file).load()
    tensors = {
        name: torch.empty(stored.size, dtype=stored.properties.dtype)
        for name, stored in metadata.state_dict_metadata.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            checkpoint.load(tensors, storage_reader=safe_reader(path, metadata), no_dist=True)
        except checkpoint.CheckpointException as error:  # which is no Exception
            raise ValueError("its tensors cannot be read") from error
    moments = {
        index: {
            "step": saved["steps"][name],
            "exp_avg": tensors.pop(f"optimizer.{name}.exp_avg"),
            "exp_avg_sq": tensors.pop(f"optimizer.{name}.exp_avg_sq"),
        }
        for index, name in enumerate(names[parameter] for parameter in order)
        if name in saved["steps"]
    }
    weights = {  # a tied matrix was saved once
        name: tensors[f"model.{names[parameter]}"]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.requires_grad
    }
    saved_optimizer = {"state": moments, "param_groups": saved["groups"]}
    others = {name: x for name, x in tensors.items() if not name.startswith("model.")}
    return {"model": weights, "optimizer": saved_optimizer, **saved["values"], **others}


def safe_reader(path: Path, metadata: Any) -> Any:
    """A reader that takes the index of a checkpoint as it was read."""
    from torch.distributed.checkpoint import FileSystemReader

    class SafeReader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
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
