"""Whole-file writes, errors as one line, and typed settings."""

import dataclasses
import errno
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from utils import (
    ArgumentParser,
    InputError,
    Settings,
    add_flags,
    atomic_write,
    check_outputs,
    complain,
    complaint_of,
    during,
    flag,
    pick_device,
    run_script,
)


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


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files as Unix does")
def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path):
    """A file size limit stands in for the full disk."""
    path = tmp_path / "model.pt"
    path.write_text("before")
    script = (
        "import resource, torch\n"
        "from checkpoints.pt import write_checkpoint\n"
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


@pytest.mark.skipif(sys.platform == "win32", reason="Unix's links and devices")
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


@pytest.mark.skipif(sys.platform == "win32", reason="Unix's links and devices")
def test_places_that_cannot_be_written_or_would_lose_something_are_refused(tmp_path):
    new, old, model = tmp_path / "new", tmp_path / "old", tmp_path / "model.pt"
    old.touch()
    model.touch()
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "hard").hardlink_to(model)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/config.json").touch()
    check_outputs([new, old, "/dev/null", "/dev/null"], [model])
    for outputs, complaint in [
        ([tmp_path], "a folder"),
        ([tmp_path / "absent" / "new"], "there is no folder"),
        ([new, f"{tmp_path}/./new"], f"would overwrite the output {new}"),
        ([model], f"would overwrite the input {model}"),
        ([tmp_path / "link"], f"would overwrite the input {model}"),
        ([tmp_path / "hard"], f"would overwrite the input {model}"),
        ([tmp_path / "loop"], "a link that leads to itself"),
        ([tmp_path / "weights/config.json"], f"would overwrite the input {tmp_path}/weights"),
        ([tmp_path / ("n" * 250)], "name too long"),
    ]:
        with pytest.raises(InputError, match=f"(?i){complaint}"):
            check_outputs(outputs, [model, tmp_path / "weights"])


@pytest.mark.skipif(sys.platform == "win32", reason="asks Unix for the process")
def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], stdout=-1)
    names = [f".new.{int(dead.stdout)}.tmp", f".new.{os.getpid()}.tmp", ".new.mine.tmp"]
    names += [f".other.{int(dead.stdout)}.tmp", "new.1.tmp"]
    for name in names:
        (tmp_path / name).touch()
    check_outputs([tmp_path / "new"], [])
    # This process's own is what the name was tried with.
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[2:])
    (tmp_path / names[0]).touch()
    check_outputs([tmp_path / "new"], [tmp_path / names[0]])  # unless it is read
    assert (tmp_path / names[0]).exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Unix's links")
def test_files_of_a_folder_that_is_read_are_not_written_through_their_links(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "blob").write_text("x")
    (tmp_path / "weights/a").symlink_to(tmp_path / "blob")
    (tmp_path / "weights/b").write_text("x")
    os.link(tmp_path / "weights/b", tmp_path / "hard")
    for name in ("blob", "hard"):
        with pytest.raises(InputError, match="would overwrite the input"):
            check_outputs([tmp_path / name], [tmp_path / "weights"])


@pytest.mark.skipif(sys.platform == "win32", reason="Unix's devices")
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


CUDA = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.2 GiB"
CPU = "[enforce fail at alloc_cpu.cpp:128] . DefaultCPUAllocator: can't allocate memory: you tried "
CPU += "to allocate 4294967296 bytes. Error code 12 (Cannot allocate memory)"


@pytest.mark.parametrize(
    ("error", "size"),
    [
        (torch.OutOfMemoryError(CUDA), "2.5 GiB asked for "),
        (RuntimeError(CPU), "4.00 GiB asked for "),
        (RuntimeError("unable to mmap 1048576 bytes from file <x>: Cannot allocate memory (12)"),
         "1.0 MiB asked for "),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), ""),
        (RuntimeError("could not create a primitive"), ""),
        (MemoryError(), ""),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), ""),
    ],
    ids=["cuda", "cpu", "mmap", "cublas", "onednn", "python", "system"],
)  # fmt: skip
def test_too_little_memory_tells_how_much_for_what_and_what_takes_less(capsys, error, size):
    def main():
        with during("fine-tuning", "lower --batch_size"), during("step 3"):
            raise error

    with pytest.raises(SystemExit) as stop:
        run_script(main)
    assert stop.value.code == 2
    line = f"error: out of memory: {size}while step 3; lower --batch_size\n"
    assert capsys.readouterr().err == line


def test_other_errors_are_left_alone():
    error = RuntimeError("shape '[3]' is invalid for input of size 4")
    with pytest.raises(RuntimeError), during("step 3", "lower --batch_size"):
        raise error
    assert complaint_of(error) is None and not hasattr(error, "__notes__")


def test_a_long_error_is_cut_in_the_middle(capsys):
    complain("what " + "x\n" * 1_000_000 + "; what to do")
    line = capsys.readouterr().err
    assert line.startswith("error: what x x") and line.endswith("x ; what to do\n")
    assert len(line) < 1100 and line.count("\n") == 1 and "…" in line


def test_use_gpu_takes_cuda_then_mps_then_complains(monkeypatch):
    assert pick_device(False) == torch.device("cpu")
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert pick_device(True).type == expected
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(InputError, match="neither"):
        pick_device(True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example(Settings):
    title = "an example"
    size: int = flag(3, "how large", low=1, high=9)
    rate: float | None = flag(None, "how fast")
    kind: str = flag("a", "which", choices=("a", "b"), spelling="--the-kind")
    shares: tuple[float, float] = flag((0.5, 0.5), "of two", high=1, nargs=2)
    is_on: bool = flag(False, "or off")
    given: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("size", 0, "--size 0: out of range, expected 1 to 9"),
        ("size", "3", "--size 3: expected int, not str"),
        ("size", 3.0, "--size 3.0: expected int, not float"),
        ("size", True, "--size True: expected int, not bool"),
        ("size", None, "--size None: expected int, not None"),
        ("rate", math.nan, "--rate nan: out of range"),
        ("rate", math.inf, "--rate inf: out of range"),
        ("rate", "fast", "--rate fast: expected float or None, not str"),
        ("kind", "c", "--the-kind c: expected one of a, b"),
        ("shares", [0.5], "expected 2 values"),
        ("shares", [0.5, 2.0], "out of range, expected 0 to 1"),
        ("shares", [0.5, "x"], "expected float, not str"),
        ("is_on", 1, "--is_on 1: expected bool, not int"),
    ],
)
def test_settings_of_another_type_or_range_are_refused_by_name(name, value, complaint):
    with pytest.raises(InputError, match=re.escape(complaint)):
        Example(**{name: value})


def test_settings_take_what_is_near_enough():
    settings = Example(size=np.int64(4), rate=2, kind="b", shares=[1, 0], given=["size"])
    assert settings == Example(size=4, rate=2.0, kind="b", shares=(1.0, 0.0), given=("size",))
    assert type(settings.size) is int and type(settings.rate) is float
    assert settings.changed() == {"size": 4, "rate": 2.0, "kind": "b", "shares": (1.0, 0.0)}
    plain = {"size": 4, "rate": 2.0, "kind": "b", "shares": [1.0, 0.0], "is_on": False}
    assert settings.plain() == plain | {"given": ["size"]}
    assert Example(**plain) == settings.replace(given=())
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.size = 5


def test_flags_come_from_the_fields():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Other(Settings):
        title = "another"
        size: int = flag(7, "how large")

    parser = ArgumentParser(prog="p")
    add_flags(parser, [Example, Other])
    assert vars(parser.parse_args([])) == {}  # what is not given stays absent
    given = parser.parse_args(["--size", "5", "--the-kind", "b", "--shares", "0", "1", "--is_on"])
    assert Example.from_args(given) == Example(size=5, kind="b", shares=(0.0, 1.0), is_on=True)
    help = " ".join(parser.format_help().split())
    assert "an example:" in help
    assert "--size N how large (default: 3; another 7)" in help
    assert "--shares X X of two (default: 0.5 0.5)" in help
    assert "--the-kind {a,b}" in help and "--given" not in help
    with pytest.raises(InputError, match="--size: invalid int value: 'x'; --help lists"):
        parser.parse_args(["--size", "x"])
