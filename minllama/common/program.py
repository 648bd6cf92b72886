"""How a program starts and ends: flags, Ctrl-C, standard streams, exit codes."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import IO, Any, NoReturn

from minllama.common.errors import InputError, print_error, user_message


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
            message = user_message(error)
            if message is None:
                raise
            print_error(message)
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
    """Take standard output and error as `Stream`. Errors of the latter cannot be told to anyone.

    Standard input that is closed is `/dev/null` too.
    """
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115, left open as in `Stream`
    output = Stream(sys.stdout, STDOUT)
    # Whatever the terminal can show; and a log has each line as it comes.
    output.reconfigure(errors="backslashreplace", line_buffering=True)
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
