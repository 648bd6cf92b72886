"""The folder of a run: one process at a time, one set of settings, whole files only."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from minllama.common.errors import InputError
from minllama.common.files import atomic_write, remove_leftovers
from minllama.training import state

MODEL, METRICS, RUN = "model.pt", "metrics.jsonl", "pretrain.json"
TOKENIZER, TOKENS, LOCK = "tokenizer.model", "tokens", ".lock"


@contextlib.contextmanager
def open_run(
    folder: Path,
    settings: dict,
    goes_on: Callable[[dict], bool] = lambda before: False,
    reads: Iterable[str | Path] = (),
) -> Iterator[None]:
    """Hold the folder of a run, new or with an earlier part of the same run, against all others.

    Until its first report a run may be begun again with other settings. What an error leaves behind
    before the training has begun is removed.

    Args:
        settings: all that the result depends on, as JSON has it.
        goes_on: whether a run with former settings, other than these, may go on with these.
        reads: what the run reads, which is not in the folder while that may be cleared.

    Raises:
        InputError: it holds another run, or files of something else, or it is in use.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: not a folder; name another --output_dir")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with lock(folder):
            _continue_or_clear(folder, settings, goes_on, reads)
            with atomic_write(folder / RUN) as file:
                json.dump(settings, file, indent=1)
            try:
                yield
            except Exception:
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


def _continue_or_clear(
    folder: Path, settings: dict, goes_on: Callable[[dict], bool], reads: Iterable[str | Path]
) -> None:
    _remove_leftovers(folder)
    tokens = folder / TOKENS
    files = [folder / name for name in (MODEL, METRICS, RUN, TOKENIZER, state.FILE)]
    for path in [*files, *(tokens.iterdir() if tokens.is_dir() else [])]:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise InputError(f"{path}: not a file of a run; move it away, or name another folder")
    names = {path.name for path in folder.iterdir()} - {LOCK}
    before = _settings_before(folder, settings) if RUN in names else {}
    if RUN not in names and names:
        raise InputError(f"{folder}: holds other files; name an empty or a new --output_dir")
    changes = [
        f"{name} was {before.get(name)}, is {value}"
        for name, value in settings.items()
        if before.get(name) != value
    ]
    has_state = state.newest(folder) is not None
    has_reports = METRICS in names and (folder / METRICS).stat().st_size > 0
    if (MODEL in names or has_reports) and not has_state:
        raise InputError(
            f"{folder}: holds a trained model or reports, but no {state.FILE} to continue from; "
            "name another --output_dir"
        )
    if (MODEL in names or has_reports) and changes and not goes_on(before):
        hint = ""
        if len(changes) == 1 and settings.get("steps") != before.get("steps"):
            hint = " (a run takes more --steps only where its rate is constant: --min_lr as --lr)"
        raise InputError(
            f"{folder}: holds a run with other settings ({'; '.join(changes)}); "
            f"give the same ones to continue it, or another --output_dir{hint}"
        )
    is_other = changes and not (before and goes_on(before))
    for path in reads if is_other or not has_state else ():
        if Path(path).resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{path}: a file of the run in {folder}; name another --output_dir")
    if is_other:
        _clear(folder)


def _settings_before(folder: Path, settings: dict) -> dict:
    try:
        before = json.loads((folder / RUN).read_bytes())
    except (ValueError, RecursionError):
        before = None
    if not isinstance(before, dict) or before.keys() != settings.keys():
        raise InputError(f"{folder / RUN}: no settings of a run; name another --output_dir")
    return before


def _remove_leftovers(folder: Path) -> None:
    """Remove what a run of this folder left that was killed while it wrote, and nothing else."""
    for name in (MODEL, METRICS, RUN, TOKENIZER, state.FILE):
        remove_leftovers(folder / name)
    for path in folder.glob(f".{state.FOLDER}.tmp"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
    tokens = folder / TOKENS
    if tokens.is_dir() and not tokens.is_symlink():
        for leftover in tokens.glob(".*.tmp"):
            name, _, _ = leftover.name[1:].removesuffix(".tmp").rpartition(".")
            if name.endswith((".bin", ".json")):
                remove_leftovers(tokens / name)


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
            with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
                if json.loads(line)["step"] <= step:
                    file.write(f"{line}\n")
