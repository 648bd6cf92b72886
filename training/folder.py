"""The folder of a run: one process at a time, one set of settings, whole files only."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from training import state
from utils import InputError, atomic_write

MODEL, METRICS, RUN = "model.pt", "metrics.jsonl", "pretrain.json"
TOKENIZER, TOKENS, LOCK = "tokenizer.model", "tokens", ".lock"


LARGE = 1 << 30  # bytes; a larger file is not read whole for its fingerprint
N_BLOCKS, BLOCK = 256, 1 << 16  # what is read of it: so many blocks of so many bytes
SAMPLE = N_BLOCKS * BLOCK


def fingerprint(path: str | Path, large: int = LARGE) -> str:
    """The name and the beginning of the SHA-256 of a file, or of all files of a folder.

    Of a file of more than `large` bytes it is the name, the size, and the SHA-256 of 256 blocks of
    64 KiB: the first, the last, and evenly spaced ones between them. A change that keeps the size
    and touches none of the blocks is not seen.
    """
    path = Path(path)
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(file for file in path.iterdir() if file.is_file()):
            digest.update(fingerprint(file, large).encode())
        return f"{path.name} {digest.hexdigest()[:16]}"
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= max(large, BLOCK):
            return f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
        for i in range(N_BLOCKS):
            file.seek((size - BLOCK) * i // (N_BLOCKS - 1))
            digest.update(file.read(BLOCK))
    return f"{path.name} {size} {digest.hexdigest()[:16]}"


@contextlib.contextmanager
def open_run(folder: Path, settings: dict) -> Iterator[None]:
    """Hold the folder of a run, new or with an earlier part of the same run, against all others.

    As long as there is no model in it, a run may be begun again with other settings. What an error
    leaves behind before the training has begun is removed.

    Args:
        settings: all that the result depends on, as JSON has it.

    Raises:
        InputError: it holds another run, or files of something else, or it is in use.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: not a folder; name another --output_dir")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with lock(folder):
            _continue_or_clear(folder, settings)
            with atomic_write(folder / RUN) as file:
                json.dump(settings, file, indent=1)
            try:
                yield
            except InputError:
                if state.newest(folder) is None:
                    _clear(folder)
                raise
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # it is not empty, as it should be
                folder.rmdir()


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Let no other process into a folder.

    Raises:
        InputError: another process is in it.
    """
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(folder / LOCK))
        except TimeoutError:
            raise InputError(f"{folder}: another process is training there") from None
        yield


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock, a file of that name; it goes with the process, however that ends.

    Raises:
        TimeoutError: another process holds it.
    """
    from filelock import FileLock

    with FileLock(path).acquire(blocking=False):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows removes it when it is released
                path.unlink()


def _continue_or_clear(folder: Path, settings: dict) -> None:
    names = {path.name for path in folder.iterdir() if path.suffix != ".tmp"} - {LOCK}
    if RUN not in names:
        if names:
            raise InputError(f"{folder}: holds other files; name an empty or a new --output_dir")
        before = {}
    else:
        try:
            before = json.loads((folder / RUN).read_bytes())
        except ValueError:
            before = None
        if not isinstance(before, dict) or before.keys() != settings.keys():
            raise InputError(f"{folder / RUN}: no settings of a run; name another --output_dir")
    changes = [
        f"{name} was {before.get(name)}, is {value}"
        for name, value in settings.items()
        if before.get(name) != value
    ]
    if MODEL in names and changes:
        raise InputError(
            f"{folder}: holds a run with other settings ({'; '.join(changes)}); "
            "give the same ones to continue it, or another --output_dir"
        )
    if MODEL in names and state.newest(folder) is None:
        raise InputError(
            f"{folder}: holds a model, but no {state.FILE} to continue from; "
            "name another --output_dir"
        )
    for leftover in folder.rglob(".*.tmp"):  # of a run that was killed while it wrote
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
    if changes:
        _clear(folder)


def _clear(folder: Path) -> None:
    for name in (RUN, METRICS, TOKENIZER):
        (folder / name).unlink(missing_ok=True)
    state.remove(folder)
    shutil.rmtree(folder / TOKENS, ignore_errors=True)


def metrics_until(path: Path, step: int) -> None:
    """Drop from a file of reports those after a step, which will come again, and lines cut off."""
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    with atomic_write(path) as file:
        for line in lines:
            with contextlib.suppress(ValueError, TypeError, KeyError):
                if json.loads(line)["step"] <= step:
                    file.write(f"{line}\n")
