"""Files that appear whole, and outputs that would lose something."""

import os
import subprocess
import sys

import pytest

from minllama.common.errors import InputError
from minllama.common.files import atomic_write, check_outputs


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
        "from minllama.checkpoints.pt import write_checkpoint\n"
        "from minllama.common.program import run_script\n"
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
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/config.json").touch()
    check_outputs([new, old, "/dev/null", "/dev/null"], [model])
    for outputs, complaint in [
        ([tmp_path], "a folder"),
        ([tmp_path / "pipe"], "a pipe"),
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


@pytest.mark.skipif(sys.platform == "win32", reason="Unix's devices")
def test_a_standard_stream_that_is_a_file_is_no_place_to_write(tmp_path):
    """Renaming a file over the log would lose the log."""
    script = "from minllama.common.files import check_outputs; check_outputs(['/dev/stdout'], [])"
    with (tmp_path / "log").open("w") as log:
        done = subprocess.run([sys.executable, "-c", script], stdout=log, stderr=subprocess.PIPE)
    assert b"/dev/stdout: stands for the file" in done.stderr


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
