"""How programs end: Ctrl-C, and standard streams that are closed, full, or no longer read."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from minllama.common.errors import InputError
from minllama.common.program import survive_closed_stdout

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Unix's signals and streams")

SCRIPT = """
import sys, time
from minllama.common.errors import InputError
from minllama.common.program import *
end_at_interrupt()

def prints():
    for i in range(99):
        print("line", i)

def trains():
    with survive_closed_stdout():
        prints()
        print("progress", file=sys.stderr)
        open("trained", "w").close()

def fails():
    raise InputError("what; what to do")

def sleeps():
    print("ready", flush=True)
    time.sleep(0.5)

run_script(globals()[sys.argv[1]])
"""
FULL = "error: standard output: No space left on device"
SAVED_ALL_THE_SAME = f"{FULL}; the rest was not printed, but all files are written\n"
NO_READER = "| (exec <&-; sleep 0.5)"


@pytest.fixture
def script(tmp_path) -> Path:
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path / "script.py"


def shell(line: str, folder: Path) -> tuple[int, str, str]:
    """The exit code of the first command in a pipeline of Bash, and the outputs."""
    done = subprocess.run(
        ["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("work", "streams", "code", "errors"),
    [
        ("prints", ">&-", 0, ""),
        ("prints", "<&- >&- 2>&-", 0, ""),
        ("prints", NO_READER, 141, ""),
        ("prints", "> /dev/full", 2, f"{FULL}\n"),
        ("fails", "2>&-", 2, ""),
        ("fails", NO_READER, 2, "error: what; what to do\n"),
        ("trains", ">&- 2>&-", 0, ""),
        ("trains", NO_READER, 0, "progress\n"),
        ("trains", f"2>&1 {NO_READER}", 0, ""),
        ("trains", "> /dev/full", 2, f"progress\n{SAVED_ALL_THE_SAME}"),
        ("trains", "2> /dev/full", 0, ""),
    ],
)
def test_streams_that_are_closed_full_or_not_read(script, work, streams, code, errors):
    if "/dev/full" in streams and not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    wait = "sleep 0.1; " if NO_READER in streams else ""
    line = f"({wait}exec {sys.executable} script.py {work}) {streams}"
    found, output, error_output = shell(line, script.parent)
    assert (found, error_output) == (code, errors)
    assert (script.parent / "trained").exists() == (work == "trains")
    assert work != "fails" or not output


def test_fine_tuning_survives_its_reader(project):
    command = f"{sys.executable} {ROOT / 'run_llama.py'} --option finetune"
    code, output, errors = shell(f"{command} {' '.join(project.flags)} | head -1", project.path)
    assert (code, errors) == (0, "") and output.startswith("args: ")
    assert (project.path / "toy-test-finetuning-output.txt").is_file()


def test_an_error_of_the_work_precedes_that_of_the_output(monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(InputError, match="lower --lr"), survive_closed_stdout():
        print("epoch 0")
        raise InputError("lower --lr")


# Ctrl-C


def start(command: list[str], folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    "script", ["run_llama.py", "sanity_check.py", "rope_test.py", "optimizer_test.py"]
)
def test_ctrl_c_while_pytorch_is_imported_has_no_traceback(script):
    process = start([sys.executable, script], ROOT)
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    assert (*process.communicate(), process.returncode) == ("", "", 130)


@pytest.mark.parametrize(("trap", "code"), [("", 130), ("trap '' INT; ", 0)])
def test_ctrl_c_is_ignored_where_the_shell_ignores_it(script, trap, code):
    """As for commands that a shell starts in the background."""
    line = f"{trap}exec {sys.executable} script.py sleeps"
    process = start(["bash", "-c", line], script.parent)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert (*process.communicate(), process.returncode) == ("", "", code)
