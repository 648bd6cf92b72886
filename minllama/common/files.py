"""Files that appear whole, and outputs that are never inputs."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import shutil
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from minllama.common.errors import InputError, missing_file


@contextlib.contextmanager
def name_file_in_errors(path: str | Path) -> Iterator[None]:
    """Let errors of the system name the file, as those of an unwritable disk do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """Open a file for writing that takes its name only once it is whole, and on the disk.

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


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk, where the system can (not on Windows)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some file systems cannot
        pass
    finally:
        os.close(descriptor)


def remove_leftovers(path: str | Path, kept: Container[Any] = ()) -> None:
    """Remove what processes left behind that were killed while `atomic_write` wrote a file.

    Args:
        kept: identities of files that stay, as what is read.
    """
    path = Path(os.path.realpath(path))
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        pid = leftover.name.removeprefix(f".{path.name}.").removesuffix(".tmp")
        if pid.isdecimal() and leftover.is_file() and not is_alive(int(pid)):
            if identity(leftover) in kept:
                continue
            with contextlib.suppress(OSError):
                leftover.unlink()


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs. Where the system does not tell (Windows), yes."""
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
    """See, before any work, that `atomic_write` can write the outputs without losing anything.

    What is read is never written: no output is an input, by whatever name or link, or a file of a
    folder that is one. What processes left of these outputs that were killed is removed.

    Raises:
        InputError: no file can be written there, or it is another output or an input.
    """
    taken = {identity(path): f"the input {path}" for path in inputs}
    folders = {path: what for path, what in taken.items() if isinstance(path, Path)}
    for folder in filter(Path.is_dir, folders):  # its files may be links, as in caches
        taken |= {identity(path): f"the input {folder / path.name}" for path in folder.iterdir()}
    for output in outputs:
        path = Path(os.path.realpath(output))
        if path.is_dir():
            raise InputError(f"{output}: a folder; give the name of a file to write")
        if not path.parent.is_dir():
            raise InputError(f"{output}: there is no folder {path.parent} to write it in")
        if path.is_fifo():
            raise InputError(f"{output}: a pipe, which may never be read; name a file")
        if path.exists() and not path.is_file():
            continue  # a device
        if Path(output).parts[:2] in (("/", "dev"), ("/", "proc"), ("/", "sys")):
            raise InputError(f"{output}: stands for the file {path}; name another one")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise InputError(f"{output}: the folder {path.parent} is not writable")
        if path.exists() and not os.access(path, os.W_OK):
            raise InputError(f"{output}: read-only; name another file, or make it writable")
        if path.is_symlink():
            raise InputError(f"{output}: a link that leads to itself; name another file")
        what = taken.get(identity(path))
        if path.exists():
            inside = (text for folder, text in folders.items() if path.is_relative_to(folder))
            what = what or next(inside, None)
        if what is not None:
            raise InputError(f"{output}: would overwrite {what}; name another file")
        _try_name(output, path)
        remove_leftovers(path, kept=taken)
        taken[identity(path)] = f"the output {output}"


def identity(path: str | Path) -> Any:
    """What two names of one file share: its number on its device; of other paths the real path."""
    path = Path(os.path.realpath(path))
    if path.is_file():
        status = path.stat()
        return status.st_dev, status.st_ino
    return path


def _try_name(output: str | Path, path: Path) -> None:
    """Make the temporary file of `atomic_write`, and remove it.

    Raises:
        InputError: the system does not allow it, as with a name that is too long.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise InputError(f"{output}: {error.strerror}; name another file") from error


LARGE = 1 << 30  # bytes; a larger file is not read whole for its fingerprint
N_BLOCKS, BLOCK = 256, 1 << 16  # what is read of it: so many blocks of so many bytes
SAMPLE = N_BLOCKS * BLOCK


def file_fingerprint(path: str | Path, large: int = LARGE) -> str:
    """The name and the beginning of the SHA-256 of a file, or of all files of a folder.

    Of a file of more than `large` bytes it is the name, the size, and the SHA-256 of 256 blocks of
    64 KiB: the first, the last, and evenly spaced ones between them. A change that keeps the size
    and touches none of the blocks is not seen.

    Raises:
        FileNotFoundError: it is neither, as a pipe or a device, which may never end.
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
    with path.open("rb") as file:
        if size <= max(large, BLOCK):
            return f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
        for i in range(N_BLOCKS):
            file.seek((size - BLOCK) * i // (N_BLOCKS - 1))
            digest.update(file.read(BLOCK))
    return f"{path.name} {size} {digest.hexdigest()[:16]}"
