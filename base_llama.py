"""The base class of Llama, reading and writing checkpoints, and the names of their tensors."""

import pickle
import warnings
import zipfile
from pathlib import Path

import torch
from torch import nn

from config import LlamaConfig
from utils import InputError, atomic_write, missing_file

__all__ = [
    "LlamaConfig",
    "LlamaPreTrainedModel",
    "checked_state_dict",
    "read_checkpoint",
    "write_checkpoint",
]


class LlamaPreTrainedModel(nn.Module):
    """Base class that holds the configuration and draws the initial weights."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config

    def _init_weights(self, module: nn.Module) -> None:
        """Draw a Linear's or Embedding's weight from N(0, 0.02); for `self.apply`."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def read_checkpoint(path: str | Path) -> dict:
    """Load a file that `torch.save` wrote, without ever running code that it holds.

    Returns:
        the saved dict, its tensors on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: the file is not a dict of tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise missing_file(path)
    with path.open("rb") as file:
        start = file.read(512).lstrip()
    again = "; `bash setup.sh` fetches it again" if path.name == "stories42M.pt" else ""
    if not start:
        raise InputError(f"{path}: an empty file, not a checkpoint{again}")
    if start.startswith(b"<"):
        raise InputError(f"{path}: a web page, not a checkpoint{again}")
    if start.startswith(b"PK") and not zipfile.is_zipfile(path):
        size = path.stat().st_size
        raise InputError(f"{path}: incomplete, only its first {size:,} bytes are here{again}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of foreign pickles, which are refused below anyway
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: refused, it is not a checkpoint of tensors and plain values, "
            "and loading anything else could run code"
        ) from error
    except (OSError, MemoryError):
        raise
    except Exception as error:  # whatever a reader trips over in a damaged file
        raise InputError(f"{path}: a damaged checkpoint{again}") from error
    if not isinstance(checkpoint, dict):
        raise InputError(f"{path}: a {type(checkpoint).__name__}, expected a checkpoint's dict")
    return checkpoint


def write_checkpoint(saved: dict, path: str | Path) -> None:
    """Save a dict of tensors and plain values so that `read_checkpoint` can load it.

    Raises:
        OSError: it could not be written; what stood there before remains.
    """
    with atomic_write(path, "wb") as file:
        try:
            torch.save(saved, file)
        except RuntimeError as error:
            # A failed write makes PyTorch's zip writer fail once more when it closes.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


OTHER_NAMES = {
    "attention.wq.": "attention.compute_query.",
    "attention.wk.": "attention.compute_key.",
    "attention.wv.": "attention.compute_value.",
    "attention.wo.": "attention.compute_output.",
}


def canonical_name(name: str) -> str:
    """This repository's name of a tensor: without `torch.compile`'s prefix, and not llama2.c's."""
    name = name.removeprefix("_orig_mod.")
    for theirs, ours in OTHER_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def checked_state_dict(tensors: dict, expected: dict, checkpoint: str | Path) -> dict:
    """A checkpoint's tensors under this repository's names, embedding and head made one.

    Args:
        expected: the state dict of a model of its configuration.

    Raises:
        InputError: names or shapes are not as expected; the message names all that differ.
    """
    tied = {"tok_embeddings.weight", "output.weight"}
    state_dict, complaints = {}, []
    for name, tensor in tensors.items():
        name = canonical_name(str(name))
        if name in state_dict:
            complaints.append(f"{name} is there twice")
        elif name not in expected:
            complaints.append(f"{name} is unexpected")
        elif not is_dense(tensor):
            complaints.append(f"{name} is no tensor of floating-point numbers")
        elif tensor.shape != expected[name].shape:
            shapes = tuple(tensor.shape), tuple(expected[name].shape)
            complaints.append(f"{name} has shape {shapes[0]}, expected {shapes[1]}")
        elif not tensor.isfinite().all():
            complaints.append(f"{name} has values that are not finite")
        state_dict[name] = tensor
    absent = expected.keys() - state_dict.keys()
    if len(absent & tied) == 1:
        absent -= tied  # one of the two is enough
    complaints += [f"{name} is missing" for name in sorted(absent)]
    if complaints:
        complaint = "; ".join(complaints)
        raise InputError(f"{checkpoint}: not the tensors of its model_args: {complaint}")

    embedding, head = (state_dict.get(name) for name in ("tok_embeddings.weight", "output.weight"))
    if embedding is not None and head is not None and not torch.equal(embedding, head):
        warnings.warn(
            f"{checkpoint}: tok_embeddings.weight differs from output.weight; "
            "output.weight is used for both",
            stacklevel=3,
        )
    return state_dict | dict.fromkeys(tied, embedding if head is None else head)


def is_dense(value: object) -> bool:
    """Whether a checkpoint's value is an ordinary tensor of floating-point numbers."""
    return (
        isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.layout == torch.strided
        and not value.is_meta
    )
