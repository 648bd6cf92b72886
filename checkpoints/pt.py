"""Files that `torch.save` wrote, in the layout of `stories42M.pt`, read without running code."""

import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from config import LlamaConfig
from utils import InputError, atomic_write, missing_file

OTHER_NAMES = {  # llama2.c's, and ours
    "attention.wq.": "attention.compute_query.",
    "attention.wk.": "attention.compute_key.",
    "attention.wv.": "attention.compute_value.",
    "attention.wo.": "attention.compute_output.",
}
TIED = ("tok_embeddings.weight", "output.weight")  # the matrix that embedding and head share


def load(path: str | Path) -> tuple[LlamaConfig, dict[str, torch.Tensor]]:
    """Read a Llama: a dict with tensors as `model` and arguments of `LlamaConfig` as `model_args`.

    Returns:
        the configuration; the tensors by this repository's names, in the file's precision.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: it is no such checkpoint.
    """
    saved = read_checkpoint(path)
    for key in ("model_args", "model"):
        if not isinstance(saved.get(key), dict):
            raise InputError(f"{path}: no dict {key!r} in it, so it is no Llama checkpoint")
    try:
        config = LlamaConfig.from_model_args(saved["model_args"])
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: model_args describe no Llama: {error}") from error
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in saved["model"].items():
        name = canonical_name(str(name))
        if name in tensors:
            raise InputError(f"{path}: {name} is there twice")
        tensors[name] = tensor
    return config, tensors


def canonical_name(name: str) -> str:
    """This repository's name of a tensor: without `torch.compile`'s prefix, and not llama2.c's."""
    name = name.removeprefix("_orig_mod.")
    for theirs, ours in OTHER_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def check_tensors(
    tensors: dict[str, Any], expected: dict[str, torch.Tensor], path: str | Path
) -> dict[str, torch.Tensor]:
    """See that a checkpoint holds the tensors of its model.

    Args:
        expected: the state dict of a model of its configuration.

    Returns:
        the same tensors, embedding and head made one if only one of them is there.

    Raises:
        InputError: names, shapes or values are not as expected; the message names all that differ.
    """
    complaints = []
    for name, tensor in tensors.items():
        if name not in expected:
            complaints.append(f"{name} is unexpected")
        elif not is_dense(tensor):
            complaints.append(f"{name} is no tensor of floating-point numbers")
        elif tensor.shape != expected[name].shape:
            shapes = tuple(tensor.shape), tuple(expected[name].shape)
            complaints.append(f"{name} has shape {shapes[0]}, expected {shapes[1]}")
        elif not is_finite(tensor):
            complaints.append(f"{name} has values that are not finite")
    absent = expected.keys() - tensors.keys()
    if len(absent & set(TIED)) == 1:
        absent -= set(TIED)  # one of the two is enough
    complaints += [f"{name} is missing" for name in sorted(absent)]
    if complaints:
        complaint = "; ".join(complaints)
        raise InputError(f"{path}: not the tensors of its model_args: {complaint}")
    shared = [tensors[name] for name in TIED if name in tensors]
    if len(shared) == 2 and not torch.equal(*shared):
        raise InputError(
            f"{path}: tok_embeddings.weight differs from output.weight; an output head of its own "
            "is not supported"
        )
    return tensors | dict.fromkeys(TIED, shared[-1])


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is infinite or no number."""
    # These make the sum so too, which is much quicker to compute. It may overflow without them.
    is_likely = tensor.sum(dtype=torch.float32).isfinite()
    return bool(is_likely or tensor.isfinite().all())


def is_dense(value: object) -> bool:
    """Whether a checkpoint's value is an ordinary tensor of floating-point numbers."""
    return (
        isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.layout == torch.strided
        and not value.is_meta
    )


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
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of foreign pickles, which are refused below anyway
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # whatever a reader trips over in a damaged file
        raise InputError(f"{path}: {diagnosis(path, error)}") from error
    if not isinstance(checkpoint, dict):
        raise InputError(f"{path}: a {type(checkpoint).__name__}, expected a checkpoint's dict")
    return checkpoint


def diagnosis(path: Path, error: Exception) -> str:
    """Why a file could not be loaded, and what to do."""
    again = "; `bash setup.sh` fetches it again" if path.name == "stories42M.pt" else ""
    with path.open("rb") as file:
        start = file.read(512).lstrip()
    if not start:
        return f"an empty file, not a checkpoint{again}"
    if start.startswith(b"<"):
        return f"a web page, not a checkpoint{again}"
    if start.startswith(b"PK") and not zipfile.is_zipfile(path):
        return f"incomplete, only its first {path.stat().st_size:,} bytes are here{again}"
    if isinstance(error, pickle.UnpicklingError):
        return (
            "refused, it is not a checkpoint of tensors and plain values, "
            "and loading anything else could run code"
        )
    return f"a damaged checkpoint{again}"


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
