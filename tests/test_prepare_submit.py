"""Submissions: what goes in, what is refused, what the messages name."""

import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT

from prepare_submit import ADVANCED, REQUIRED, check_file, main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "work"
    folder.mkdir()
    for name in REQUIRED:
        (folder / name).write_text("x")
    return folder


def members(path):
    with zipfile.ZipFile(path) as archive:
        return {info.filename for info in archive.infolist()}


def test_complete_folder_becomes_a_checked_zip(folder, tmp_path, capsys):
    kept = ["alice-report.pdf", "data/sst-train.txt", "structure.md", "tokenizer.model"]
    left_out = [
        "stories42M.pt",
        "finetune-5-2e-05.PT",
        "old.zip",
        "backup.tar.gz",
        ".venv/pyvenv.cfg",
        ".git/config",
        "myenv/pyvenv.cfg",
        "myenv/lib/x.py",
        "__pycache__/llama.cpython-311.pyc",
        "tests/__pycache__/a.pyc",
        ".pytest_cache/README.md",
        ".DS_Store",
    ]
    for name in kept + left_out:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    main(str(folder), " alice ")
    expected = {f"alice/{name}" for name in [*REQUIRED, *kept]}
    assert members(tmp_path / "alice.zip") == expected
    assert "alice.zip is a complete submission for alice." in capsys.readouterr().out
    main("alice.zip", "alice")
    check_file("alice.zip", "alice")


def test_the_working_folder_itself_can_be_packed_twice(folder, monkeypatch):
    monkeypatch.chdir(folder)
    main(".", "alice")
    main(".", "alice")
    assert members("alice.zip") == {f"alice/{name}" for name in REQUIRED}


@pytest.mark.parametrize("absent", ["rope.py", "sst-dev-prompting-output.txt"])
def test_missing_files_are_named_and_an_older_zip_stays(folder, tmp_path, absent):
    (folder / absent).unlink()
    (tmp_path / "alice.zip").write_text("older")
    with pytest.raises(AssertionError, match=f"lacks {absent}"):
        main(folder, "alice")
    assert (tmp_path / "alice.zip").read_text() == "older"


def test_advanced_outputs_are_all_four_or_none(folder):
    for name in ADVANCED[:3]:
        (folder / name).write_text("x")
    with pytest.raises(AssertionError, match=f"lacks {ADVANCED[3]}"):
        main(folder, "alice")
    (folder / ADVANCED[3]).write_text("x")
    main(folder, "alice")


def write_zip(path, names):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "x")


@pytest.mark.parametrize(
    ("extra", "complaint"),
    [
        ("/etc/passwd", "unsafe path '/etc/passwd'"),
        ("alice/../../evil.py", "unsafe path"),
        ("alice/..\\evil.py", "unsafe path"),
        ("C:/evil.py", "unsafe path"),
        ("bob/llama.py", "must hold one folder alice; outside it is 'bob/llama.py'"),
        ("loose.py", "outside it is 'loose.py'"),
        ("alice/../../evil/", "unsafe path"),
        ("other/", "outside it is 'other/'"),
    ],
)
def test_unsafe_and_stray_members_are_refused(tmp_path, extra, complaint):
    write_zip(tmp_path / "a.zip", [f"alice/{name}" for name in REQUIRED] + [extra])
    with pytest.raises(AssertionError) as error:
        check_file(tmp_path / "a.zip", "alice")
    assert complaint in str(error.value)


def test_empty_files_are_named(tmp_path):
    write_zip(tmp_path / "a.zip", [f"alice/{name}" for name in REQUIRED[1:]])
    with zipfile.ZipFile(tmp_path / "a.zip", "a") as archive:
        archive.writestr(f"alice/{REQUIRED[0]}", "")
    with pytest.raises(AssertionError, match=f"an empty {REQUIRED[0]}"):
        check_file(tmp_path / "a.zip", "alice")


def test_damaged_zips_are_refused(tmp_path):
    path = tmp_path / "a.zip"
    path.write_bytes(b"no zip")
    with pytest.raises(AssertionError, match="not a zip file"):
        check_file(path, "alice")
    write_zip(path, [f"alice/{name}" for name in REQUIRED])
    content = bytearray(path.read_bytes())
    content[30 + len(f"alice/{REQUIRED[0]}")] ^= 1  # the first member's first byte
    path.write_bytes(content)
    with pytest.raises(AssertionError, match="damaged"):
        check_file(path, "alice")


def test_ids_that_would_leave_the_folder_are_refused(folder):
    for aid in ("", "../x", "a/b", ".", "-x"):
        with pytest.raises(AssertionError, match="cannot name a folder"):
            main(folder, aid)
    with pytest.raises(AssertionError, match="no such file"):
        main(folder / "absent", "alice")


def test_as_a_script_it_ends_in_one_line(folder):
    (folder / "llama.py").unlink()
    done = subprocess.run(
        [sys.executable, ROOT / "prepare_submit.py", folder, "alice"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == f"error: {folder} lacks llama.py\n"


def test_the_unpacked_submission_generates(project, tmp_path):
    """All that a program needs but weights and data is in the zip."""
    work = tmp_path / "handed-in"
    left_out = shutil.ignore_patterns(".*", "__pycache__", "tests", "*.pt", "sst-*", "cfimdb-*")
    shutil.copytree(ROOT, work, ignore=left_out)
    for name in REQUIRED:
        if name.endswith(".txt"):
            (work / name).write_text("x")
    main(work, "alice")
    with zipfile.ZipFile("alice.zip") as archive:
        archive.extractall(tmp_path / "unpacked")
    command = [sys.executable, tmp_path / "unpacked/alice/run_llama.py", "--max_new_tokens", "3"]
    command += ["--pretrained-model-path", "model.pt", "--prefix", "a warm"]
    done = subprocess.run(command, cwd=project.path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\na warm") == 2
