"""Errors that a user can cause: one line that says what, where and what to do."""

from __future__ import annotations

import contextlib
import errno
import re
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_MESSAGE = 1000  # characters of an error line
FOR_LOADING = "close other programs, or take a smaller model"
OUT_OF_MEMORY_SIGNS = (
    "allocate memory",
    "out of memory",
    "bad_alloc",
    "STATUS_ALLOC_FAILED",
    "failed to map segment",  # of a library
    "could not create a primitive",  # of oneDNN, which says no more
    "could not execute a primitive",
)


class InputError(ValueError):
    """A mistake in the user's input; its text says what, where and what to do."""


def missing_file(path: str | Path) -> FileNotFoundError:
    """The error for an absent file, with the command that may fetch it."""
    text = str(path)
    if Path(path).exists():
        return FileNotFoundError(f"{path}: not a file; name one")
    if re.match(r"\w\w+:/", text):
        return FileNotFoundError(f"{path}: a URL; download it, and name the file")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not re.search(r"\.[a-z]+$", text):
        return FileNotFoundError(
            f"{path}: no such file or folder; if it names a model on the Hugging Face hub, "
            f"`hf download {path} --local-dir FOLDER` fetches it"
        )
    return FileNotFoundError(
        f"{path}: no such file; `bash setup.sh` fetches the assignment's weights and data"
    )


def user_message(error: Exception) -> str | None:
    """The message for an error that a user can cause; None for all others."""
    if isinstance(error, InputError):
        return str(error)
    if is_out_of_memory(error):
        match = re.search(r"(?:allocate|mmap) (([\d.]+) (bytes|[KMGT]iB))", str(error))
        size = ""
        if match:
            asked = in_gibibytes(int(match[2])) if match[3] == "bytes" else match[1]
            size = f"{asked} asked for "
        return f"out of memory: {size}{' '.join(getattr(error, '__notes__', ()))}".rstrip(": ")
    if isinstance(error, OSError):
        has_file = error.filename is not None and error.strerror is not None
        return f"{error.filename}: {error.strerror}" if has_file else str(error)
    return None


def print_error(message: str) -> None:
    """Print an error on one line of standard error. A long message loses its middle."""
    line = " ".join(message.split())
    if len(line) > MAX_MESSAGE:
        line = f"{line[: MAX_MESSAGE * 3 // 4]} … {line[-MAX_MESSAGE // 4 :]}"
    print(f"error: {line}", file=sys.stderr)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of the machine or of a GPU ran out."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # of torch
        return True
    text = str(error)
    return isinstance(error, RuntimeError | ImportError) and any(
        sign in text for sign in OUT_OF_MEMORY_SIGNS
    )


@contextlib.contextmanager
def explain_out_of_memory(work: str, hint: str) -> Iterator[None]:
    """Add to an out-of-memory error, once, what was being done and what would take less memory."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error) and not hasattr(error, "__notes__"):
            error.add_note(f"while {work}; {hint}")
        raise


@contextlib.contextmanager
def needs_package(work: str, package: str) -> Iterator[None]:
    """Refuse work whose optional package is not installed, or does not run here, with its reason.

    Raises:
        InputError: importing or trying the package in this context failed.
    """
    try:
        yield
    except Exception as error:  # an installation can be broken in any way
        remedy = "install it with `python -m pip install -r requirements-extra.txt`"
        if not isinstance(error, ModuleNotFoundError):
            remedy = "check its version, its settings and its environment variables"
        raise InputError(f"{work} needs {package}, which fails: {error}; {remedy}") from error


def in_gibibytes(n_bytes: int | None) -> str:
    """Format a number of bytes."""
    return "unknown" if n_bytes is None else f"{n_bytes / 2**30:.2f} GiB"
