"""The cost of synchronizing files with the disk before they take their name.

    .venv/bin/python -m benchmarks.sync

Writes files of 240 MB and 1 kB with `atomic_write` in the working folder, in turns with and without
`fsync`, and prints the range of seconds.
"""

import os
import tempfile
import time
from pathlib import Path
from unittest import mock

from minllama.common.files import atomic_write
from minllama.common.program import positive, run_script, script_parser

SIZES = {"240 MB": 240_000_000, "1 kB": 1_000}


def seconds_to_write(path: Path, content: bytes) -> float:
    start = time.perf_counter()
    with atomic_write(path, "wb") as file:
        file.write(content)
    return time.perf_counter() - start


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--rounds", type=positive, default=10)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = Path(folder, "file")
        for name, size in SIZES.items():
            content = os.urandom(size)
            times: dict[str, list[float]] = {"with": [], "without": []}
            for _ in range(rounds):
                times["with"].append(seconds_to_write(path, content))
                with mock.patch.object(os, "fsync"):
                    times["without"].append(seconds_to_write(path, content))
            for way, values in times.items():
                print(f"{name} {way} fsync: {min(values):.4f} to {max(values):.4f} s")


if __name__ == "__main__":
    run_script(main)
