"""What the scripts share: seeds, devices, whole-file writes, and errors as one line."""

import argparse
import contextlib
import ctypes
import os
import random
import resource
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


class InputError(ValueError):
    """Something is wrong with what the user gave; its text says what, where and what to do."""


def missing_file(path: str | Path) -> FileNotFoundError:
    """The error for a file that is not there, with the command that may bring it."""
    if Path(path).exists():
        return FileNotFoundError(f"{path}: not a file; name one")
    return FileNotFoundError(
        f"{path}: no such file; `bash setup.sh` fetches the assignment's weights and data"
    )


def with_defaults(args: Any, more: dict[str, Any] | None = None) -> argparse.Namespace:
    """The command line's flags, those that the assignment does not have at their defaults if unset.

    So the functions that take `args` also take those of other people's scripts.

    Args:
        more: further defaults.
    """
    defaults = {
        "given": (),
        "causal": None,
        "tokenizer_path": None,
        "dtype": "float32",
        "grad_accum": 1,
        "activation_checkpointing": False,
        "skip_train_eval": False,
        "metrics_out": None,
        "report": False,
        "load": None,
    }
    return argparse.Namespace(**(defaults | (more or {}) | vars(args)))


def seed_everything(seed: int = 11711) -> None:
    """Seed the generators of `random`, numpy and PyTorch, on every device."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def pick_device(use_gpu: bool) -> torch.device:
    """CUDA or else MPS where a GPU is asked for, otherwise the CPU.

    Raises:
        InputError: there is neither.
    """
    if not use_gpu:
        return torch.device("cpu")
    device = best_device()
    if device.type == "cpu":
        raise InputError("--use_gpu: PyTorch finds neither a CUDA nor an MPS device; leave it out")
    return device


def best_device() -> torch.device:
    """CUDA, or else MPS, or else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def peak_memory(device: torch.device) -> int:
    """The most bytes that were in use so far: of the GPU's memory, or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def keep_freed_memory() -> None:
    """Let glibc keep the memory that tensors give back for the next ones.

    By default large blocks go back to the system at once, and come again page by page, zeroed: in
    training up to a fifth of the time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


@contextlib.contextmanager
def named_errors(path: str | Path) -> Iterator[None]:
    """Let errors of the system name the file, as those of an unwritable disk do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """Open a file for writing that takes its name only once it is whole.

    On an error what stood there before remains. Text is UTF-8. A device such as `/dev/null` is
    written to directly.
    """
    path = Path(os.path.realpath(path))
    encoding = None if "b" in mode else "utf-8"
    if path.exists() and not path.is_file():
        with path.open(mode, encoding=encoding) as file:
            yield file
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with named_errors(path):
            with temporary.open(mode, encoding=encoding) as file:
                yield file
            if path.exists():
                shutil.copymode(path, temporary)
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_outputs(outputs: Iterable[str | Path], inputs: Iterable[str | Path]) -> None:
    """See, before any work, that `atomic_write` can write the outputs without losing anything.

    Raises:
        InputError: no file can be written there, or it is another output or an input.
    """
    taken = {os.path.realpath(path): f"the input {path}" for path in inputs}
    for output in outputs:
        path = Path(os.path.realpath(output))
        if path.is_dir():
            raise InputError(f"{output}: a folder; give the name of a file to write")
        if not path.parent.is_dir():
            raise InputError(f"{output}: there is no folder {path.parent} to write it in")
        if path.exists() and not path.is_file():
            continue  # a device
        if Path(output).parts[:2] in (("/", "dev"), ("/", "proc")):
            raise InputError(f"{output}: stands for the file {path}; name another one")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise InputError(f"{output}: the folder {path.parent} is not writable")
        if str(path) in taken:
            raise InputError(f"{output}: would overwrite {taken[str(path)]}; name another file")
        taken[str(path)] = f"the output {output}"


def number(kind: type, low: float, high: float = 2**31 - 1) -> Callable[[str], float]:
    """An argparse type: an int or a float from `low` to `high`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is out of range, expected {low} to {high}")
        return value

    parse.__name__ = kind.__name__  # what argparse calls the type in its errors
    return parse


def adder(group: Any) -> Callable:
    """`group.add_argument`, but the help also tells the default."""

    def add(flag: str, *, help: str, **settings: Any) -> None:
        if settings.get("default") is not None and "default" not in help:
            help += " (default: %(default)s)"
        group.add_argument(flag, help=help, **settings)

    return add


def declared(add_arguments: Callable[[argparse.ArgumentParser], None]) -> dict[str, Any]:
    """The flags that a function declares, at their defaults."""
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    return vars(parser.parse_args([]))


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with errors as one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; --help lists all flags\n")


def run_script(main: Callable[[], None]) -> None:
    """Call `main`, ending user errors with one line and exit code 2."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_args: print(f"warning: {message}", file=sys.stderr)
        sys.stdout.reconfigure(errors="backslashreplace")  # whatever the terminal can show
        try:
            main()
        except InputError as error:
            sys.exit(_complain(str(error)))
        except OSError as error:
            named = error.filename is not None and error.strerror is not None
            sys.exit(_complain(f"{error.filename}: {error.strerror}" if named else str(error)))
        except KeyboardInterrupt:
            sys.exit(130)


def _complain(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2
