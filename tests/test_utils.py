"""Whole-file writes and errors as one line."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from utils import InputError, atomic_write, check_outputs, pick_device, run_script


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "out.txt"
    path.write_text("before")
    with pytest.raises(KeyError), atomic_write(path) as file:
        file.write("half")
        raise KeyError
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["out.txt"]
    with atomic_write(path) as file:
        file.write("naïve")
    assert path.read_bytes() == "naïve".encode()
    assert os.listdir(tmp_path) == ["out.txt"]


def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path):
    """A file size limit stands in for the full disk."""
    path = tmp_path / "model.pt"
    path.write_text("before")
    script = (
        "import resource, torch\n"
        "from base_llama import write_checkpoint\n"
        "from utils import run_script\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "def main():\n"
        f"    write_checkpoint({{'x': torch.zeros(200_000)}}, {str(path)!r})\n"
        "run_script(main)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=os.getcwd(), capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: {path}: ") and done.stderr.count("\n") == 1
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["model.pt"]


def test_links_permissions_and_devices_stay_what_they_are(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("x")
    target.chmod(0o640)
    link.symlink_to(target)
    with atomic_write(link) as file:
        file.write("y")
    assert link.is_symlink() and target.read_text() == "y"
    assert target.stat().st_mode & 0o777 == 0o640
    with atomic_write("/dev/null") as file:
        file.write("z")
    assert not os.path.isfile("/dev/null")


def test_places_that_cannot_be_written_or_would_lose_something_are_refused(tmp_path):
    new, old, model = tmp_path / "new", tmp_path / "old", tmp_path / "model.pt"
    old.touch()
    model.touch()
    (tmp_path / "link").symlink_to(model)
    check_outputs([new, old, "/dev/null", "/dev/null"], [model])
    for outputs, complaint in [
        ([tmp_path], "a folder"),
        ([tmp_path / "absent" / "new"], "there is no folder"),
        ([new, f"{tmp_path}/./new"], f"would overwrite the output {new}"),
        ([model], f"would overwrite the input {model}"),
        ([tmp_path / "link"], f"would overwrite the input {model}"),
    ]:
        with pytest.raises(InputError, match=complaint):
            check_outputs(outputs, [model])


def test_a_standard_stream_that_is_a_file_is_no_place_to_write(tmp_path):
    """Renaming a file over the log would lose the log."""
    script = "from utils import check_outputs; check_outputs(['/dev/stdout'], [])"
    with (tmp_path / "log").open("w") as log:
        done = subprocess.run([sys.executable, "-c", script], stdout=log, stderr=subprocess.PIPE)
    assert b"/dev/stdout: stands for the file" in done.stderr


def test_errors_of_the_users_end_in_one_line_and_ours_in_a_traceback(capsys, tmp_path):
    def user_error():
        raise InputError("this,\nthat")

    def missing_file():
        (tmp_path / "absent").read_bytes()

    def our_error():
        raise ValueError

    for main, line in (
        (user_error, "error: this, that\n"),
        (missing_file, f"error: {tmp_path}/absent: No such file or directory\n"),
    ):
        with pytest.raises(SystemExit) as stop:
            run_script(main)
        assert stop.value.code == 2
        assert capsys.readouterr().err == line
    with pytest.raises(ValueError):
        run_script(our_error)


def test_use_gpu_takes_cuda_then_mps_then_complains(monkeypatch):
    assert pick_device(False) == torch.device("cpu")
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert pick_device(True).type == expected
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(InputError, match="neither"):
        pick_device(True)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_kept_for_the_next_tensors():
    """A tensor in the place of one that was freed needs no new pages."""
    code = """
import resource, torch
from utils import keep_freed_memory
keep_freed_memory()
faults = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
for size in (64 << 20, 60 << 20):
    torch.ones(size, dtype=torch.uint8)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[1] - faults[0], faults[2] - faults[1])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    first, second = map(int, done.stdout.split())
    assert second < first / 10
