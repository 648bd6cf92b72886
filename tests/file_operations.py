"""Stops a program at its n-th operation on files, as a kill would: nothing is cleaned up.

`python -m tests.file_operations N run_llama.py FLAGS…` kills itself with SIGKILL before the n-th
call that opens a file for writing, renames, removes, makes a folder or syncs; N = 0 counts them on
standard error instead.
"""

import os
import runpy
import signal
import sys

EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}


def main() -> None:
    n, program = int(sys.argv[1]), sys.argv[2]
    sys.argv = sys.argv[2:]
    sys.path.insert(0, os.path.dirname(os.path.abspath(program)))
    count = 0

    def reached() -> None:
        nonlocal count
        count += 1
        if count == n:
            sys.stdout.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: str, args: tuple) -> None:
        writes = (
            event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if (writes and not str(args[0]).startswith("/dev/")) or event in EVENTS:
            reached()

    fsync = os.fsync

    def sync(descriptor: int) -> None:
        reached()
        fsync(descriptor)

    os.fsync = sync
    sys.addaudithook(watch)
    try:
        runpy.run_path(program, run_name="__main__")
    finally:
        if n == 0:
            print(count, file=sys.stderr)


if __name__ == "__main__":
    main()
