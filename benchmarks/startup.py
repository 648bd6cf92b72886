"""How long the command line takes to start, beside `import torch`.

    .venv/bin/python -m benchmarks.startup

Four things take turns, each a new process: `import torch` alone, `run_llama.py --help`, a mistyped
flag, and the time until the first token of a text appears on a terminal. The text is the demo
model's. The table gives the median of the rounds in seconds, and its ratio to `import torch`. A
first round, which is not counted, brings the files into memory.

The terminal is a pseudo-terminal, which Windows does not have.
"""

import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from argparse import RawDescriptionHelpFormatter
from statistics import median

import torch

from minllama.common.flags import DEMO
from minllama.common.program import ArgumentParser, run_script
from minllama.tasks.generate import PREFIX

RUN_LLAMA = [sys.executable, str(DEMO.parent.parent / "run_llama.py")]
COMMANDS = {  # with their exit codes
    "import torch": ([sys.executable, "-c", "import torch"], 0),
    "run_llama.py --help": ([*RUN_LLAMA, "--help"], 0),
    "a mistyped flag": ([*RUN_LLAMA, "--bacth_size", "8"], 2),
}
GENERATE = [*RUN_LLAMA, "--pretrained-model-path", str(DEMO / "model.pt")]
FIRST_TOKEN = re.compile(rb"Temperature is 0\.0\r?\n" + re.escape(PREFIX.encode()) + rb"[^\r\n]")


def seconds_to_end(command: list[str], exit_code: int) -> float:
    """The time of a process from its start to its end.

    Raises:
        RuntimeError: it ended with another exit code.
    """
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode != exit_code:
        raise RuntimeError(f"{command} ended with {done.returncode}: {done.stderr}")
    return seconds


def seconds_to_first_token(command: list[str], folder: str) -> float:
    """The time from the start of a process to the first text behind the prompt; ends it then.

    Args:
        folder: where it runs and may write files.

    Raises:
        RuntimeError: it ended without such a text.
    """
    import pty  # not on Windows

    terminal, its_output = pty.openpty()
    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=its_output, stderr=errors
        )
        os.close(its_output)
        try:
            shown = b""
            while not FIRST_TOKEN.search(shown):
                new = read_some(terminal)
                if not new:
                    errors.seek(0)
                    raise RuntimeError(f"{command} showed no token: {errors.read().decode()}")
                shown += new
            return time.perf_counter() - start
        finally:
            process.kill()
            process.wait()
            os.close(terminal)


def read_some(terminal: int) -> bytes:
    """What a terminal shows next; b"" once the process at its other end is gone."""
    try:
        return os.read(terminal, 4096)
    except OSError:  # how Linux tells that
        return b""


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print(f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}")
    times: dict[str, list[float]] = {name: [] for name in [*COMMANDS, "the first token"]}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(1 + rounds):
            for name, (command, exit_code) in COMMANDS.items():
                times[name].append(seconds_to_end(command, exit_code))
            times["the first token"].append(seconds_to_first_token(GENERATE, folder))
    its_median = {name: median(values[1:]) for name, values in times.items()}
    print(f"{'':20}{'seconds':>9}{'ratio':>7}")
    for name, seconds in its_median.items():
        print(f"{name:20}{seconds:9.2f}{seconds / its_median['import torch']:7.2f}")


if __name__ == "__main__":
    run_script(main)
