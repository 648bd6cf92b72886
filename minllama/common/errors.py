"""Errors that a user can cause: one line that says what, where and what to do."""

from __future__ import annotations

import contextlib
import errno
import re
import sys
from collections.abc import Iterator
from pathlib import Path

LONGEST = 1000  # characters of an error's line
FOR_LOADING = "close other programs, or take a smaller model"  # where memory runs out


class InputError(ValueError):
    """Something is wrong with what the user gave; its text says what, where and what to do."""


def missing_file(path: str | Path) -> FileNotFoundError:
    """The error for a file that is not there, with the command that may bring it."""
    if Path(path).exists():
        return FileNotFoundError(f"{path}: not a file; name one")
    return FileNotFoundError(
        f"{path}: no such file; `bash setup.sh` fetches the assignment's weights and data"
    )


def user_message(error: Exception) -> str | None:
    """What to tell of an error that a user can cause; None for all others."""
    if isinstance(error, InputError):
        return str(error)
    if is_out_of_memory(error):
        asked = re.search(r"(?:allocate|mmap) ([\d.]+) (bytes|[KMGT]iB)", str(error))
        size = "" if asked is None else f"{size_as_read(float(asked[1]), asked[2])} asked for "
        return f"out of memory: {size}{' '.join(getattr(error, '__notes__', ()))}".rstrip(": ")
    if isinstance(error, OSError):
        named = error.filename is not None and error.strerror is not None
        return f"{error.filename}: {error.strerror}" if named else str(error)
    return None


def print_error(message: str) -> None:
    """Tell an error in one line, which is not long: of a long one the middle is left out."""
    line = " ".join(message[: 2 * LONGEST].split())
    if len(message) > LONGEST:
        end = " ".join(message[-LONGEST:].split())
        line = f"{line[: LONGEST * 3 // 4]} … {end[-LONGEST // 4 :]}"
    print(f"error: {line}", file=sys.stderr)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no more memory, of the machine's or of a GPU's."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # of torch
        return True
    if str(error) in ("could not create a primitive", "could not execute a primitive"):
        return True  # of oneDNN, which does not say more
    signs = ("allocate memory", "out of memory", "bad_alloc", "STATUS_ALLOC_FAILED")
    signs += ("failed to map segment",)  # of a library that is imported
    return isinstance(error, RuntimeError | ImportError) and any(
        sign in str(error) for sign in signs
    )


@contextlib.contextmanager
def explain_out_of_memory(work: str, less: str | None = None) -> Iterator[None]:
    """Let an error of too little memory tell what was being done, and what would take less.

    Where one is in another, the inner one tells the work, and the first that knows it what to do.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            notes = getattr(error, "__notes__", [])
            if not notes:
                error.add_note(f"while {work};")
            if less is not None and len(notes) < 2:
                error.add_note(less)
        raise


def size_as_read(size: float, unit: str) -> str:
    """A size in an error of too little memory, as people read it."""
    if unit != "bytes":
        return f"{size:g} {unit}"
    return in_gibibytes(round(size)) if size > 2**29 else f"{size / 2**20:.1f} MiB"


def in_gibibytes(n_bytes: int | None) -> str:
    """A size as people read it."""
    return "unknown" if n_bytes is None else f"{n_bytes / 2**30:.2f} GiB"
