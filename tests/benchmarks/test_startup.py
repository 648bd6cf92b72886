"""The clock of the start-up benchmark must stop at the right moment."""

import sys
import time

import pytest

from benchmarks.startup import seconds_to_end, seconds_to_first_token
from minllama.tasks.generate import PREFIX

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")


def command(*steps: str) -> list[str]:
    """A process that takes some steps; -u writes every text at once."""
    return [sys.executable, "-u", "-c", "\n".join(["import sys, time", *steps])]


def test_the_first_token_is_what_follows_the_prompt(tmp_path):
    wanted = command(
        "assert sys.stdout.isatty() and not sys.stderr.isatty()",
        f"sys.stdout.write('args: {{}}\\nTemperature is 0.0\\n' + {PREFIX!r})",
        "sys.stderr.write('a line apart')",
        "time.sleep(0.5)",
        "sys.stdout.write(' in')",
        "time.sleep(60)",
    )
    start = time.perf_counter()
    assert 0.5 < seconds_to_first_token(wanted, str(tmp_path)) < 30
    assert time.perf_counter() - start < 30  # the process does not live on


def test_a_text_without_a_token_is_an_error_and_no_time(tmp_path):
    none = command(
        f"sys.stdout.write('Temperature is 0.0\\n' + {PREFIX!r} + '\\n---')",
        "sys.exit('out of luck')",
    )
    with pytest.raises(RuntimeError, match="out of luck"):
        seconds_to_first_token(none, str(tmp_path))


def test_a_command_must_end_as_expected():
    with pytest.raises(RuntimeError, match="ended with 3: no"):
        seconds_to_end(command("sys.stderr.write('no')", "sys.exit(3)"), exit_code=2)
    assert seconds_to_end(command("sys.exit(2)"), exit_code=2) > 0
