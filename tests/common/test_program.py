"""How the programs end: Ctrl-C, and standard streams that are closed, full, or read no further."""

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
from minllama.common.program import end_at_interrupt, outliving_output, run_script

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Unix's signals and streams")

RUN = f"{sys.executable} {ROOT / 'run_llama.py'}"
GENERATE = "--pretrained-model-path model.pt --prefix a --max_new_tokens 3"
TEXTS = [f"generated-sentence-temp-{t}.txt" for t in (0, 1)]
FULL = "error: standard output: No space left on device"
full_device = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


@pytest.fixture
def shell(project):
    """Runs a line of Bash in the project's folder: to the first command's exit code, and stderr."""

    def run(line: str, **environment: str) -> tuple[int, str]:
        done = subprocess.run(
            ["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}"],
            cwd=project.path,
            env=os.environ | environment,
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stderr

    return run


@pytest.fixture
def finetune(project):
    """The command that fine-tunes, and the files that it leaves."""
    kinds = [f"toy-{split}-finetuning-output.txt" for split in ("dev", "test")]
    files = [project.path / name for name in ("finetune-1-2e-05.pt", *kinds)]
    return f"{RUN} --option finetune {' '.join(project.flags)}", files


# Ctrl-C


def start(command: str, folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        command.split(), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    "script", ["run_llama.py", "sanity_check.py", "rope_test.py", "optimizer_test.py"]
)
def test_ctrl_c_while_pytorch_is_imported_is_no_traceback(script):
    process = start(f"{sys.executable} {script}", ROOT)
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    assert (*process.communicate(), process.returncode) == ("", "", 130)


@pytest.mark.parametrize("seconds", [0, 0.3])
def test_ctrl_c_during_a_training_is_no_traceback(project, finetune, seconds):
    command, _ = finetune
    process = start(command.replace("python", "python -u") + " --epochs 100000", project.path)
    assert process.stdout.readline().startswith("args: ")
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert (errors, process.returncode) == ("", 130)


def test_who_ignores_ctrl_c_goes_on_ignoring_it(project):
    """As a shell has it for a command that it starts in the background."""
    line = f"trap '' INT; exec {RUN} {GENERATE}"
    process = subprocess.Popen(["bash", "-c", line], cwd=project.path, stdout=subprocess.PIPE)
    for _ in range(20):
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == 0


def test_ctrl_c_means_what_it_did_where_run_script_is_called_by_others():
    before = signal.getsignal(signal.SIGINT)
    run_script(lambda: None)
    assert signal.getsignal(signal.SIGINT) is before
    try:
        end_at_interrupt()
        seen = []
        run_script(lambda: seen.append(signal.getsignal(signal.SIGINT)))
        assert seen == [signal.default_int_handler]
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


# Closed streams


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_as_good_as_none(project, shell, closed):
    assert shell(f"{RUN} {GENERATE} {closed}")[0] == 0
    assert all((project.path / name).read_text().startswith("a") for name in TEXTS)


def test_an_error_does_not_go_to_standard_output_because_its_own_stream_is_closed(project):
    done = subprocess.run(
        ["bash", "-c", f"{RUN} --epochs 0 2>&-"], cwd=project.path, stdout=subprocess.PIPE
    )
    assert (done.returncode, done.stdout) == (2, b"")


def test_a_training_needs_no_streams(shell, finetune):
    command, files = finetune
    assert shell(f"{command} >&- 2>&-")[0] == 0
    assert all(file.is_file() for file in files)


# Readers that are gone


@pytest.mark.parametrize(
    ("flags", "unbuffered"), [(GENERATE, ""), (GENERATE, "1"), ("--help", ""), ("--help", "1")]
)
def test_without_a_reader_what_only_prints_ends_quietly(shell, flags, unbuffered):
    line = f"(sleep 0.2; exec {RUN} {flags}) | true"
    assert shell(line, PYTHONUNBUFFERED=unbuffered) == (141, "")


def test_without_a_reader_an_error_is_told_all_the_same(shell):
    code, errors = shell(f"(sleep 0.2; exec {RUN} --epochs 0) | true")
    assert code == 2 and errors.startswith("error: --epochs 0")


@pytest.mark.parametrize(
    ("reader", "unbuffered"), [("| true", ""), ("| head -1", "1"), ("2>&1 | true", "1")]
)
def test_without_a_reader_a_training_goes_on(shell, finetune, reader, unbuffered):
    command, files = finetune
    assert shell(f"{command} {reader}", PYTHONUNBUFFERED=unbuffered) == (0, "")
    assert all(file.is_file() for file in files)


def test_without_a_reader_a_pretraining_goes_on(project, shell):
    (project.path / "text.txt").write_text("a warm and funny film\n" * 200)
    flags = "--option pretrain --text text.txt --tokenizer-path tokenizer.model --dim 16"
    flags += " --n_layers 1 --n_heads 2 --max_seq_len 16 --batch_size 4 --steps 4 --eval_every 1"
    assert shell(f"{RUN} {flags} | true", PYTHONUNBUFFERED="1") == (0, "")
    assert (project.path / "pretrained/metrics.jsonl").read_text().count("\n") == 5


# A full disk behind standard output


@full_device
@pytest.mark.parametrize(("flags", "unbuffered"), [(GENERATE, ""), (GENERATE, "1"), ("--help", "")])
def test_a_full_standard_output_is_named(shell, flags, unbuffered):
    code, errors = shell(f"{RUN} {flags} > /dev/full", PYTHONUNBUFFERED=unbuffered)
    told = [line for line in errors.splitlines() if "tokens/s" not in line]
    assert (code, told) == (2, [FULL])


@full_device
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_training_is_saved_though_standard_output_is_full(shell, finetune, unbuffered):
    command, files = finetune
    code, errors = shell(f"{command} > /dev/full", PYTHONUNBUFFERED=unbuffered)
    assert code == 2
    assert errors == f"{FULL}; the rest was not printed, but all files are written\n"
    assert all(file.is_file() for file in files)


@full_device
def test_a_full_standard_error_stops_nothing(shell, finetune):
    command, files = finetune
    assert shell(f"{command} 2> /dev/full")[0] == 0
    assert all(file.is_file() for file in files)


def test_an_error_of_the_work_itself_comes_first(monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(InputError, match="lower --lr"), outliving_output():
        print("epoch 0")
        raise InputError("lower --lr")
    with pytest.raises(InputError, match="standard output: No space"), outliving_output():
        print("epoch 0")
