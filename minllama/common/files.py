"""Files that are written whole or not at all, and outputs that never overwrite inputs."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from minllama.common.errors import InputError, missing_file

LARGE = 1 << 30  # bytes; of a larger file, the fingerprint reads a sample
N_BLOCKS, BLOCK = 256, 1 << 16  # the number of blocks in a sample, and the bytes of each
SAMPLE = N_BLOCKS * BLOCK


@contextlib.contextmanager
def name_file_in_errors(path: str | Path) -> Iterator[None]:
    """Add a file's name to errors of the system that lack one, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """Open a temporary file that replaces `path` once it is whole and on the disk.

    After an error the old file remains. Text is UTF-8. A device such as `/dev/null` is written to
    directly.
    """
    encoding = None if "b" in mode else "utf-8"
    if is_device(path):
        with open(path, mode, encoding=encoding) as file:
            yield file
        return
    path = Path(os.path.realpath(path))
    temporary = temporary_path(path)
    try:
        with name_file_in_errors(path):
            with temporary.open(mode, encoding=encoding) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if path.exists():
                shutil.copymode(path, temporary)
            temporary.replace(path)
            sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def is_device(path: str | Path) -> bool:
    """Whether a path is neither a file nor a folder, as `/dev/null` and pipes are."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def temporary_path(path: Path) -> Path:
    """The file that `atomic_write` writes in this process; its name has machine and process."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to the disk, where the system can (not on Windows)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_leftovers(path: str | Path) -> None:
    """Remove temporary files of processes of this machine that were killed while they wrote."""
    path = Path(os.path.realpath(path))
    prefix = f".{path.name}.{socket.gethostname()}."
    for leftover in path.parent.glob(f"{glob.escape(prefix)}*.tmp"):
        pid = leftover.name.removeprefix(prefix).removesuffix(".tmp")
        if pid.isdecimal() and not is_alive(int(pid)):
            shutil.rmtree(leftover, ignore_errors=True)  # of a folder
            with contextlib.suppress(OSError):
                leftover.unlink()


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs; always true on Windows, which cannot be asked."""
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def check_outputs(outputs: Iterable[str | Path], inputs: Iterable[str | Path]) -> None:
    """Check, before any work, that the outputs can be written and overwrite no input.

    An output may be neither an input, by whatever name or link, nor a file in a folder that is an
    input, nor another output. Removes the outputs' leftovers of killed processes.

    Raises:
        InputError: an output cannot be written, or would overwrite something.
    """
    taken: dict[Any, str] = {}
    for path in map(Path, inputs):
        files = [path, *path.iterdir()] if path.is_dir() else [path]
        taken |= {identity(file): f"the input {file}" for file in files}
    for output in outputs:
        if is_device(output):
            continue
        path = Path(os.path.realpath(output))
        check_writable(output, path)
        remove_leftovers(path)
        if identity(path) in taken:
            raise InputError(
                f"{output}: would overwrite {taken[identity(path)]}; name another file"
            )
        taken[identity(path)] = f"the output {output}"


def check_writable(output: str | Path, path: Path) -> None:
    """Check that `atomic_write` can write a file, whose real path is `path`.

    Raises:
        InputError: it cannot.
    """
    if path.is_dir():
        raise InputError(f"{output}: a folder; give the name of a file to write")
    if not path.parent.is_dir():
        raise InputError(f"{output}: there is no folder {path.parent} to write it in")
    if path.exists() and not os.access(path, os.W_OK):
        raise InputError(f"{output}: read-only; name another file, or make it writable")
    try:
        temporary_path(path).touch()
        temporary_path(path).unlink()
    except OSError as error:  # such as a name that is too long
        raise InputError(f"{output}: {error.strerror}; name another file") from error


def refuse_lfs_pointer(path: str | Path) -> None:
    """Raise an `InputError` if a file is only the pointer that Git LFS leaves in its place."""
    with Path(path).open("rb") as file:
        if file.read(30) == b"version https://git-lfs.github":
            raise InputError(f"{path}: a Git LFS pointer, not the file; run `git lfs pull` there")


def identity(path: str | Path) -> Any:
    """The device and inode of a file, equal for all its names; of anything else the real path."""
    path = Path(os.path.realpath(path))
    if path.is_file():
        status = path.stat()
        return status.st_dev, status.st_ino
    return path


def file_fingerprint(path: str | Path, large: int = LARGE) -> str:
    """The name and the first 16 digits of the SHA-256 of a file, or of all files of a folder.

    For a file of more than `large` bytes: the name, the size, and the SHA-256 of 256 blocks of 64
    KiB, the first, the last, and evenly spaced ones between them. Other changes that keep the size
    go unnoticed.

    Raises:
        FileNotFoundError: it is neither, such as a pipe, which may never end.
    """
    path = Path(path)
    if not path.is_file() and not path.is_dir():
        raise missing_file(path)
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(file for file in path.iterdir() if file.is_file()):
            digest.update(file_fingerprint(file, large).encode())
        return f"{path.name} {digest.hexdigest()[:16]}"
    size = path.stat().st_size
    with path.open("rb") as content:
        if size <= max(large, BLOCK):
            return f"{path.name} {hashlib.file_digest(content, 'sha256').hexdigest()[:16]}"
        for i in range(N_BLOCKS):
            content.seek((size - BLOCK) * i // (N_BLOCKS - 1))
            digest.update(content.read(BLOCK))
    return f"{path.name} {size} {digest.hexdigest()[:16]}"
