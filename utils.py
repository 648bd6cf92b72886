"""What all share: one-line errors, devices, files that appear whole, and typed settings.

Nothing here needs PyTorch before a function does, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import glob
import hashlib
import os
import re
import shutil
import signal
import sys
import types
import typing
import warnings
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar, NoReturn, Self

if TYPE_CHECKING:
    import torch

# Errors

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


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with errors as one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; --help lists all flags")

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        for argument in args:
            flag, _, value = argument.partition("=")
            if flag.startswith("--") and value == "--":  # which argparse takes for no value
                self.error(f"argument {flag}: expected a value, not --")
        return super().parse_known_args(args, namespace)

    def print_help(self, file: IO[str] | None = None) -> None:
        print(self.format_help(), end="", file=file)  # argparse would hide that it failed


def run_script(main: Callable[[], None]) -> None:
    """Call `main` and see to how the program ends.

    Errors of the user end it with one line and exit code 2, Ctrl-C with 130. Where the reader of
    standard output is gone, as behind `| head -1`, it ends without a word and with 141, the code of
    programs that a closed pipe ends; see `outliving_output` for what goes on. A standard stream
    that is closed from the beginning is like `/dev/null`.
    """
    with warnings.catch_warnings(), standard_streams():
        warnings.showwarning = lambda message, *_args: print(f"warning: {message}", file=sys.stderr)
        try:
            with _interruptible():
                _call(main)
        except KeyboardInterrupt:
            sys.exit(130)
        except Exception as error:
            if isinstance(error, BrokenPipeError) and error.filename == STDOUT:
                sys.exit(141)
            message = complaint_of(error)
            if message is None:
                raise
            complain(message)
            sys.exit(2)


def _call(main: Callable[[], None]) -> None:
    """Call `main`, then let all be written that it printed, also where it ends as --help does."""
    try:
        main()
    except SystemExit as stop:
        if not stop.code:
            sys.stdout.flush()
        raise
    sys.stdout.flush()


# Ctrl-C


def end_at_interrupt() -> None:
    """Let Ctrl-C end the program at once and without a word, until `run_script` is called.

    It is called first in scripts that then import PyTorch, which takes seconds.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # nobody wants it ignored
        signal.signal(signal.SIGINT, _end)


def _end(*_args: Any) -> NoReturn:
    os._exit(130)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt again after `end_at_interrupt`."""
    if signal.getsignal(signal.SIGINT) is not _end:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _end)


# Standard streams

STDOUT, STDERR = "standard output", "standard error"


class Stream:
    """A standard stream whose errors name it. After the first one it goes nowhere.

    Args:
        stream: None, as Python has it for a closed one, is `/dev/null`.
        raises: whether the first error is raised.

    Attributes:
        failure: the first error.
    """

    def __init__(self, stream: IO[str] | None, name: str, *, raises: bool = True):
        # It is left open until the program ends, so that no other file takes its number.
        self._stream = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        self._name, self._raises = name, raises
        self.failure: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._guarded():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._guarded():
            self._stream.flush()

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # What is in its buffer would fail again at the end of the program.
            with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())
            error.filename = self._name
            self.failure = self.failure or error
            if self._raises:
                raise


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Take standard output and error as `Stream`. Errors of the latter cannot be told to anyone."""
    output = Stream(sys.stdout, STDOUT)
    output.reconfigure(errors="backslashreplace")  # whatever the terminal can show
    errors = Stream(sys.stderr, STDERR, raises=False)
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                output.flush()
            errors.flush()


@contextlib.contextmanager
def outliving_output() -> Iterator[None]:
    """Do what goes on when standard output cannot be written any more, as a training does.

    Raises:
        InputError: at the end, if that was not because its reader is gone.
    """
    output = Stream(sys.stdout, STDOUT, raises=False)
    with contextlib.redirect_stdout(output):
        yield
        output.flush()
    if output.failure is not None and not isinstance(output.failure, BrokenPipeError):
        raise InputError(
            f"{STDOUT}: {output.failure.strerror}; the rest was not printed, but all files are "
            "written"
        )


# What to tell of errors


def complaint_of(error: Exception) -> str | None:
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


def complain(message: str) -> None:
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
    signs = ("allocate memory", "out of memory", "bad_alloc", "STATUS_ALLOC_FAILED")
    signs += ("could not create a primitive",)  # of oneDNN, which makes its code as it runs
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


@contextlib.contextmanager
def during(work: str, less: str | None = None) -> Iterator[None]:
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


# Seeds and devices


def seed_everything(seed: int = 11711) -> None:
    """Seed the generators of `random`, numpy and PyTorch, on every device."""
    import random

    import numpy as np
    import torch

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
    import torch

    if not use_gpu:
        return torch.device("cpu")
    device = best_device()
    if device.type == "cpu":
        raise InputError("--use_gpu: PyTorch finds neither a CUDA nor an MPS device; leave it out")
    return device


def best_device() -> torch.device:
    """CUDA, or else MPS (which several processes cannot share), or else the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    is_alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    return torch.device("mps" if torch.backends.mps.is_available() and is_alone else "cpu")


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on another device. Nothing waits for its way from here to a GPU of CUDA."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def peak_memory(device: torch.device) -> int | None:
    """The most bytes that were in use so far: of the GPU's memory, or by this process.

    Returns:
        None where the system does not tell (Windows).
    """
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def in_gibibytes(n_bytes: int | None) -> str:
    """A size as people read it."""
    return "unknown" if n_bytes is None else f"{n_bytes / 2**30:.2f} GiB"


# Files


@contextlib.contextmanager
def named_errors(path: str | Path) -> Iterator[None]:
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
        with named_errors(path):
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


def fingerprint(path: str | Path, large: int = LARGE) -> str:
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


# Settings


def flag(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] | Callable[[], tuple[str, ...]] | None = None,
    metavar: str | None = None,
    nargs: str | int | None = None,
    spelling: str | None = None,
) -> Any:
    """A field of `Settings` that is a flag of the command line.

    Args:
        default: its value where the flag is not given.
        low, high: the range of a number; by default from 0 to 2³¹ - 1.
        choices: the only texts that are taken, or a function that tells them.
        metavar, nargs: as in argparse.
        spelling: the flag, if it is not the field's name behind two dashes.
    """
    metadata = {
        "help": help,
        "low": 0 if low is None else low,
        "high": 2**31 - 1 if high is None else high,
        "choices": choices,
        "metavar": metavar,
        "nargs": nargs,
        "spelling": spelling,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of all settings. A field is a flag, its default, its check, and an entry when saved.

    Subclasses are frozen dataclasses. Their fields are made by `flag`, but for those that no flag
    sets. Annotations are `bool`, `int`, `float`, `str`, or a `list` or `tuple` of these, and each
    of them may be `| None`. A whole number is taken for a float, a path for a text, and a number of
    numpy's for a number.

    Attributes:
        title, description: of the group of flags in `--help`.

    Raises:
        InputError: a value is of another type or out of its range; the message names the flag.
    """

    title: ClassVar[str] = ""
    description: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        for field, annotation in fields_of(type(self)):
            value = converted(getattr(self, field.name), annotation)
            object.__setattr__(self, field.name, value)  # frozen from here on
            if complaint := complaint_about(value, annotation, field.metadata):
                raise InputError(f"{spelling_of(field)} {value}: {complaint}")

    @classmethod
    def from_args(cls, args: Any) -> Self:
        """Take from a Namespace, or any object with attributes, what these settings know."""
        return cls(**cls.known(vars(args)))

    @classmethod
    def known(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Of some values those that are fields here."""
        names = {field.name for field in dataclasses.fields(cls)}
        return {name: value for name, value in values.items() if name in names}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The flags at their defaults."""
        return {field.name: field.default for field, _ in fields_of(cls) if field.metadata}

    def plain(self) -> dict[str, Any]:
        """All fields as values that JSON and a checkpoint can hold."""
        return {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    def changed(self) -> dict[str, Any]:
        """The flags that are not at their defaults."""
        values = {name: getattr(self, name) for name in self.defaults()}
        return {name: value for name, value in values.items() if value != self.defaults()[name]}

    def replace(self, **changes: Any) -> Self:
        """The same settings but for some changes."""
        return dataclasses.replace(self, **changes)


def fields_of(cls: type[Settings]) -> list[tuple[dataclasses.Field, Any]]:
    """The fields of settings, each with its annotation as a type."""
    annotations = typing.get_type_hints(cls)
    return [(field, annotations[field.name]) for field in dataclasses.fields(cls)]


def spelling_of(field: dataclasses.Field) -> str:
    """A field's flag as the user writes it."""
    return field.metadata.get("spelling") or f"--{field.name}"


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The types that an annotation allows: `int | None` to int and NoneType."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def converted(value: Any, annotation: Any) -> Any:
    """A value as its annotation has it, where it is near enough."""
    kinds = alternatives(annotation)
    if hasattr(value, "item") and hasattr(value, "dtype"):  # a number of numpy's
        value = value.item()
    if isinstance(value, Path) and str in kinds:
        return str(value)
    if type(value) is int and float in kinds:
        return float(value)
    for kind in kinds:
        container, items = typing.get_origin(kind), typing.get_args(kind)
        if container in (list, tuple) and isinstance(value, list | tuple):
            return container(converted(item, items[0]) for item in value)
    return value


def complaint_about(value: Any, annotation: Any, metadata: typing.Mapping) -> str | None:
    """What is wrong with a setting's value, or None."""
    kinds = alternatives(annotation)
    if value is None and types.NoneType in kinds:
        return None
    for kind in kinds:
        container, items = typing.get_origin(kind), typing.get_args(kind)
        if container is not None and isinstance(value, container):
            is_fixed = container is tuple and Ellipsis not in items
            if is_fixed and len(value) != len(items):
                return f"expected {len(items)} values"
            complaints = (complaint_about(item, items[0], metadata) for item in value)
            return next(filter(None, complaints), None)
        is_other_number = isinstance(value, bool) and kind is not bool
        if container is None and isinstance(value, kind) and not is_other_number:
            return out_of_range(value, metadata) if metadata else None
    names = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
    return f"expected {names}, not {type(value).__name__}".replace("NoneType", "None")


def out_of_range(value: Any, metadata: typing.Mapping) -> str | None:
    choices = choices_of(metadata)
    if choices and value not in choices:
        return f"expected one of {', '.join(choices)}"
    low, high = metadata["low"], metadata["high"]
    if type(value) in (int, float) and not low <= value <= high:
        return f"out of range, expected {low} to {high}"
    return None


def choices_of(metadata: typing.Mapping) -> tuple[str, ...] | None:
    choices = metadata["choices"]
    return choices() if callable(choices) else choices


def plain(value: Any) -> Any:
    """A value that can be saved without pickling a class; what is none becomes its text."""
    if hasattr(value, "item") and hasattr(value, "dtype"):
        value = value.item()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if type(value) in (bool, int, float, str, types.NoneType) else str(value)


def add_flags(parser: argparse.ArgumentParser, classes: Iterable[type[Settings]]) -> None:
    """Declare the flags of settings, a group for each class; what is not given stays absent.

    A flag that several have is declared with the first of them. Its help tells the defaults of all.
    """
    classes = list(classes)
    told: dict[str, list[str]] = {}  # by flag its defaults, and where they are others
    values: dict[str, Any] = {}
    for cls in classes:
        for name, default in cls.defaults().items():
            text = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
            if name not in values and default is not None and default is not False:
                told[name] = [text]
            elif values.get(name, default) != default:
                told[name].append(f"{cls.title} {text}")
            values.setdefault(name, default)
    declared: set[str] = set()
    for cls in classes:
        group = parser.add_argument_group(cls.title, cls.description)
        for field, annotation in fields_of(cls):
            if field.metadata and field.name not in declared:
                declared.add(field.name)
                _add_flag(group, field, annotation, told.get(field.name, []))


def _add_flag(group: Any, field: dataclasses.Field, annotation: Any, told: list[str]) -> None:
    settings, help = field.metadata, field.metadata["help"]
    options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
    kind = next(kind for kind in alternatives(annotation) if kind is not types.NoneType)
    if told and "default" not in help:
        help += f" (default: {'; '.join(told)})"
    options["help"] = help.replace("%", "%%")
    if annotation is bool:
        options["action"] = "store_true"
    elif kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options["type"] = (typing.get_args(kind) or (kind,))[0]
        more = {"choices": choices_of(settings), "nargs": settings["nargs"]}
        if more["choices"] is None:
            usual = {int: "N", float: "X", str: "FILE"}
            more["metavar"] = settings["metavar"] or usual[options["type"]]
        options |= {name: value for name, value in more.items() if value is not None}
    group.add_argument(spelling_of(field), **options)
