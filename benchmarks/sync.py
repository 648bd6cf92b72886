"""What it costs that files are on the disk before they take their name.

    .venv/bin/python -m benchmarks.sync

Writes a file of 240 MB and one of 1 kB with `atomic_write` in the working folder, in turns with and
without `fsync`. Prints the least and the most seconds of each.
"""

import os
import tempfile
import time
from argparse import RawDescriptionHelpFormatter
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

from minllama.common.files import atomic_write
from minllama.common.program import ArgumentParser, run_script

SIZES = {"240 MB": 240_000_000, "1 kB": 1_000}


def seconds(path: Path, content: bytes, *, synchronized: bool) -> float:
    without = mock.patch.object(os, "fsync", lambda descriptor: None)
    with nullcontext() if synchronized else without:
        start = time.perf_counter()
        with atomic_write(path, "wb") as file:
            file.write(content)
        return time.perf_counter() - start


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for name, size in SIZES.items():
            content, taken = os.urandom(size), {True: [], False: []}
            for _ in range(args.rounds):
                for synchronized, values in taken.items():
                    path = Path(folder) / "file"
                    values.append(seconds(path, content, synchronized=synchronized))
            for synchronized, values in taken.items():
                how = "with" if synchronized else "without"
                print(f"{name} {how} fsync: {min(values):.4f} to {max(values):.4f} s")


if __name__ == "__main__":
    run_script(main)
