"""Files that are written whole, outputs that would overwrite something, fingerprints."""

import hashlib
import os
import subprocess
import sys

import pytest

from minllama.common.errors import InputError
from minllama.common.files import atomic_write, check_outputs, file_fingerprint, remove_leftovers

unix = pytest.mark.skipif(sys.platform == "win32", reason="Unix's links, devices and processes")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "out.txt"
    path.write_text("before")
    with pytest.raises(KeyError), atomic_write(path) as file:
        file.write("half")
        raise KeyError
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["out.txt"]
    with atomic_write(path) as file:
        file.write("naïve")
    assert path.read_bytes() == "naïve".encode() and os.listdir(tmp_path) == ["out.txt"]


@unix
def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path):
    """A limit on the size of files stands in for the full disk."""
    path = tmp_path / "model.bin"
    path.write_text("before")
    script = (
        "import resource\n"
        "import torch\n"
        "from minllama.checkpoints.pt import write_checkpoint\n"
        "from minllama.common.program import run_script\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        f"run_script(lambda: write_checkpoint({{'x': torch.ones(50_000)}}, {str(path)!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: {path}: ") and done.stderr.count("\n") == 1
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["model.bin"]


@unix
def test_links_permissions_and_devices_remain(tmp_path):
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


@unix
def test_outputs_that_cannot_be_written_or_would_overwrite_are_refused(tmp_path):
    new, old, model, folder = (tmp_path / name for name in ("new", "old", "model.pt", "weights"))
    old.touch()
    model.touch()
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "hard").hardlink_to(model)
    folder.mkdir()
    (folder / "config.json").touch()
    (tmp_path / "blob").touch()
    (folder / "weights.bin").symlink_to(tmp_path / "blob")  # as in a cache
    check_outputs([new, old, "/dev/null", "/dev/null"], [model])
    for outputs, message in [
        ([tmp_path], "a folder"),
        ([tmp_path / "absent" / "new"], "there is no folder"),
        ([new, f"{tmp_path}/./new"], f"would overwrite the output {new}"),
        ([model], f"would overwrite the input {model}"),
        ([tmp_path / "link"], f"would overwrite the input {model}"),
        ([tmp_path / "hard"], f"would overwrite the input {model}"),
        ([folder / "config.json"], f"would overwrite the input {folder}"),
        ([tmp_path / "blob"], f"would overwrite the input {folder}"),
        ([tmp_path / ("n" * 250)], "name too long"),
    ]:
        with pytest.raises(InputError, match=f"(?i){message}"):
            check_outputs(outputs, [model, folder])


@unix
def test_leftovers_of_processes_that_were_killed_here_are_removed_and_nothing_else(tmp_path):
    script = (
        "import os, sys\n"
        "from minllama.common.files import atomic_write\n"
        "with atomic_write(sys.argv[1]) as file:\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, tmp_path / "new"])
    process.wait()
    (leftover,) = os.listdir(tmp_path)
    others = [leftover.replace(f".{process.pid}.", f".{os.getppid()}.")]  # it runs
    others += [leftover.replace(".new.", ".new.elsewhere."), leftover.replace(".new.", ".other.")]
    for name in others:
        (tmp_path / name).touch()
    folder = tmp_path / leftover.replace(".new.", ".exported.")
    folder.mkdir()
    (folder / "weights").touch()
    remove_leftovers(tmp_path / "exported")
    check_outputs([tmp_path / "new"], [])
    assert sorted(os.listdir(tmp_path)) == sorted(others)


BLOCK = 1 << 16


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def sampled(data: bytes) -> bytes:
    """The 256 blocks of 64 KiB that stand for a large file."""
    starts = [i * (len(data) - BLOCK) // 255 for i in range(256)]
    return b"".join(data[start : start + BLOCK] for start in starts)


@pytest.mark.parametrize("size", [0, 10, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
def test_the_fingerprint_is_of_all_bytes_or_of_a_sample(tmp_path, size):
    data = bytes(i % 251 for i in range(size))
    path = tmp_path / "a.bin"
    path.write_bytes(data)
    assert file_fingerprint(path) == f"a.bin {digest(data)}"
    assert file_fingerprint(path, large=size) == f"a.bin {digest(data)}"
    large = f"a.bin {size} {digest(sampled(data))}" if size > BLOCK else f"a.bin {digest(data)}"
    assert file_fingerprint(path, large=5) == large


def test_the_fingerprint_of_a_folder_is_of_its_files(tmp_path):
    for name in ("b", "a"):
        (tmp_path / name).write_text(name)
    names = "".join(f"{name} {digest(name.encode())}" for name in ("a", "b"))
    assert file_fingerprint(tmp_path) == f"{tmp_path.name} {digest(names.encode())}"


@unix
def test_an_endless_file_has_no_fingerprint(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(FileNotFoundError, match="not a file"):
            file_fingerprint(path)
