"""Kill a program before its n-th operation on files; nothing is cleaned up.

`python -m tests.file_operations N run_llama.py FLAGS…` sends SIGKILL to itself before the n-th call
that opens a file for writing, renames, removes, makes a folder or syncs. With N = 0 it prints their
number on standard error.
"""

import contextlib
import os
import runpy
import signal
import sys
from collections.abc import Iterator
from typing import Any

EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}


def is_write(path: Any, _mode: Any, flags: Any) -> bool:
    """Whether a file is opened for writing."""
    is_device = str(path).startswith("/dev/")
    return not is_device and isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))


@contextlib.contextmanager
def killed_before(n: int) -> Iterator[None]:
    """Kill this process before its n-th operation on files; print their number if n is 0."""
    count = 0

    def count_operation() -> None:
        nonlocal count
        count += 1
        if count == n:
            sys.stdout.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    def on_event(event: str, args: tuple[Any, ...]) -> None:
        if event in EVENTS or (event == "open" and is_write(*args)):
            count_operation()

    fsync = os.fsync

    def counted_fsync(descriptor: int) -> None:
        count_operation()
        fsync(descriptor)

    os.fsync = counted_fsync
    sys.addaudithook(on_event)
    try:
        yield
    finally:
        if n == 0:
            print(count, file=sys.stderr)


def main() -> None:
    n, program = int(sys.argv[1]), sys.argv[2]
    sys.argv = sys.argv[2:]
    sys.path.insert(0, os.path.dirname(os.path.abspath(program)))
    with killed_before(n):
        runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main()
