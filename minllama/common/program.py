"""How a program starts and ends: Ctrl-C, standard streams, exit codes."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from minllama.common.errors import InputError, print_error, user_message

STDOUT, STDERR = "standard output", "standard error"


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with errors as one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; --help lists all flags")


def positive(text: str) -> int:
    """The `type` of a flag that takes a whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: need a whole number of 1 or more")
    return int(text)


def script_parser(docstring: str | None) -> ArgumentParser:
    """A parser whose help begins with the docstring of a script, line breaks included."""
    return ArgumentParser(
        description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def run_script(main: Callable[[], None]) -> None:
    """Call `main` and end the program as its outcome requires.

    A user's error is printed on one line and ends the program with exit code 2, Ctrl-C with 130, a
    closed pipe, as in `| head -1`, with 141. Other errors keep their traceback. Standard streams
    that are closed from the beginning are replaced by the null device.
    """
    interrupt = signal.getsignal(signal.SIGINT)
    if interrupt is end_quietly:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with warnings.catch_warnings(), standard_streams():
        warnings.showwarning = print_warning
        try:
            main()
        except KeyboardInterrupt:
            sys.exit(130)
        except Exception as error:
            if isinstance(error, BrokenPipeError) and error.filename == STDOUT:
                sys.exit(141)
            message = user_message(error)
            if message is None:
                raise
            print_error(message)
            sys.exit(2)
        finally:
            signal.signal(signal.SIGINT, interrupt)


def print_warning(message: Warning | str, *_args: Any, **_kwargs: Any) -> None:
    """Print a warning on one line of standard error."""
    print(f"warning: {message}", file=sys.stderr)


def end_at_interrupt() -> None:
    """Let Ctrl-C end the program at once and without output, until `run_script` is called.

    Scripts call it before they import PyTorch, which takes seconds.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not if it is ignored
        signal.signal(signal.SIGINT, end_quietly)


def end_quietly(*_args: Any) -> NoReturn:
    """Handle a signal by ending the program with the exit code of Ctrl-C."""
    os._exit(130)


class Stream:
    """A standard stream that discards everything after its first error.

    Args:
        raises: whether the first error is raised.

    Attributes:
        failure: the first error, with the stream's name as its `filename`.
    """

    def __init__(self, stream: Any, name: str, *, raises: bool):
        # The null device stays open, so that no other file takes the number of a closed stream.
        self._stream = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        self._name, self._raises = name, raises
        self.failure: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError as error:
            # The rest of the buffer would fail again at the end of the program.
            with contextlib.suppress(OSError), open(os.devnull, "wb") as devnull:
                os.dup2(devnull.fileno(), self._stream.fileno())
            error.filename = self._name
            self.failure = self.failure or error
            if self._raises:
                raise
        return len(text)


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Wrap standard output and error as `Stream`. Errors of standard error are ignored."""
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115, stays open as in `Stream`
    stdout: Any = Stream(sys.stdout, STDOUT, raises=True)
    stdout.reconfigure(errors="backslashreplace")  # print whatever the terminal can show
    stderr: Any = Stream(sys.stderr, STDERR, raises=False)
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        yield


@contextlib.contextmanager
def survive_closed_stdout() -> Iterator[None]:
    """Let a training run survive the closing of standard output.

    Raises:
        InputError: at the end, if standard output failed in another way, as on a full disk.
    """
    stdout: Any = Stream(sys.stdout, STDOUT, raises=False)
    with contextlib.redirect_stdout(stdout):
        yield
    if stdout.failure is not None and not isinstance(stdout.failure, BrokenPipeError):
        raise InputError(
            f"{STDOUT}: {stdout.failure.strerror}; the rest was not printed, but all files are "
            "written"
        )
