"""Time to start the command line, beside `import torch`.

    .venv/bin/python -m benchmarks.startup

Four processes take turns: `import torch` alone, `run_llama.py --help`, a mistyped flag, and the
demo model's generation until its first token appears on a terminal. The table has the medians in
seconds, and in brackets the ratios to `import torch`. The terminal is a pseudo-terminal, which
Windows lacks.
"""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial

from benchmarks.compare import print_table, take_turns
from experiments.runs import DEMO, run_llama
from minllama.common.program import positive, run_script, script_parser
from minllama.tasks.generate import PREFIX

COMMANDS = {  # with their exit codes
    "import torch": ([sys.executable, "-c", "import torch"], 0),
    "run_llama.py --help": (run_llama({"help": True}), 0),
    "a mistyped flag": (run_llama({"bacth_size": 8}), 2),
}
GENERATE = run_llama({"pretrained-model-path": DEMO})
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
    """The time from the start of a process in a folder to its first text after the prompt.

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
                new = b""
                with contextlib.suppress(OSError):  # Linux's end of file
                    new = os.read(terminal, 4096)
                if not new:
                    errors.seek(0)
                    raise RuntimeError(f"{command} showed no token: {errors.read().decode()}")
                shown += new
            return time.perf_counter() - start
        finally:
            process.kill()
            process.wait()
            os.close(terminal)


def seconds(measure: Callable[..., float], *arguments: object) -> dict[str, float]:
    return {"s": measure(*arguments)}


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--rounds", type=positive, default=5)
    rounds = parser.parse_args().rounds
    contenders = {
        name: partial(seconds, seconds_to_end, *command) for name, command in COMMANDS.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        contenders["the first token"] = partial(seconds, seconds_to_first_token, GENERATE, folder)
        print_table(take_turns(contenders, rounds))


if __name__ == "__main__":
    run_script(main)
