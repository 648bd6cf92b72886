"""Submissions: their files, and the mistakes and attacks that are refused."""

import os
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

import prepare_submit
from minllama.training.run import state_folder
from minllama.training.run_folder import SETTINGS
from prepare_submit import ADVANCED, REQUIRED, check_file, main

SIZES = {"sst-dev": 1101, "sst-test": 2210, "cfimdb-dev": 245, "cfimdb-test": 488}
unix = pytest.mark.skipif(sys.platform == "win32", reason="Unix's links and names")


def content(name: str) -> str:
    """A file to hand in: predictions have as many lines as the assignment's data."""
    n_lines = [n for data, n in SIZES.items() if name.startswith(data)]
    return "1 ||| a film\n" * n_lines[0] if n_lines else "x"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "work"
    folder.mkdir()
    for name in REQUIRED:
        (folder / name).write_text(content(name))
    return folder


def members(path):
    with zipfile.ZipFile(path) as archive:
        return {info.filename for info in archive.infolist()}


def test_complete_folder_becomes_a_checked_zip(folder, tmp_path, capsys, monkeypatch):
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
        "conda/conda-meta/history",
        "conda/lib/libpython3.so",
        "__pycache__/llama.cpython-311.pyc",
        "tests/__pycache__/a.pyc",
        ".pytest_cache/README.md",
        ".DS_Store",
        f"pretrained/{SETTINGS}",
        "pretrained/tokenizer.model",
        "pretrained/tokens/train.bin",
        f"{state_folder('finetune.pt', {})}/state.pt",
    ]
    for name in kept + left_out:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    main(str(folder), " alice ")
    expected = {f"alice/{name}" for name in [*REQUIRED, *kept]}
    assert members(tmp_path / "alice.zip") == expected
    assert "alice.zip is a complete submission for alice." in capsys.readouterr().out
    main("alice.zip", "alice")
    monkeypatch.chdir(folder)
    for _ in range(2):  # the folder itself, the second time with its zip file
        main(".", "alice")
        assert members("alice.zip") == expected


@pytest.mark.parametrize("absent", ["rope.py", "sst-dev-prompting-output.txt"])
def test_missing_files_are_named_and_an_older_zip_remains(folder, tmp_path, absent):
    (folder / absent).unlink()
    (tmp_path / "alice.zip").write_text("older")
    with pytest.raises(AssertionError, match=f"lacks {absent}"):
        main(folder, "alice")
    assert (tmp_path / "alice.zip").read_text() == "older"


def test_advanced_outputs_are_all_four_or_none(folder):
    for name in ADVANCED[:3]:
        (folder / name).write_text(content(name))
    with pytest.raises(AssertionError, match=f"lacks {ADVANCED[3]}"):
        main(folder, "alice")
    (folder / ADVANCED[3]).write_text("1 ||| a film\n")
    with pytest.raises(AssertionError, match=f"a {ADVANCED[3]} of 1 lines"):
        main(folder, "alice")
    (folder / ADVANCED[3]).write_text(content(ADVANCED[3]))
    main(folder, "alice")


def test_predictions_are_counted_against_the_data(folder, tmp_path):
    name = "sst-dev-prompting-output.txt"
    (folder / name).write_text("1 ||| a film\n" * 3)
    with pytest.raises(AssertionError, match=f"a {name} of 3 lines, but data/sst-dev.txt has 1101"):
        main(folder, "alice")
    (folder / "sst-dev-finetuning-output.txt").write_text("1 ||| a film\n" * 3)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/sst-dev.txt").write_text("2 ||| another film\n" * 3)
    main(folder, "alice")
    (tmp_path / "data/sst-dev.txt").write_text("2 ||| another film\n" * 4)
    with pytest.raises(AssertionError, match="has 4"):
        main("alice.zip", "alice")


@pytest.mark.parametrize(
    ("name", "line", "highest"),
    [
        ("sst-test-finetuning-output.txt", "5 ||| a film", 4),
        ("cfimdb-dev-prompting-output.txt", "2 ||| a film", 1),
        ("cfimdb-dev-prompting-output.txt", "a film", 1),
        ("sst-dev-prompting-output.txt", "good ||| a film", 4),
        ("sst-dev-prompting-output.txt", "", 4),
    ],
)
def test_predictions_are_labels(folder, name, line, highest):
    lines = (folder / name).read_text().splitlines()
    lines[6] = line
    (folder / name).write_text("\n".join(lines))
    with pytest.raises(AssertionError, match=f"{name} whose line 7 .* from 0 to {highest}"):
        main(folder, "alice")


def test_a_zip_takes_its_name_only_after_it_was_checked(folder):
    main(folder, "alice")
    before = Path("alice.zip").read_bytes()
    (folder / "llama.py").write_text("")
    with pytest.raises(AssertionError, match=f"{folder} has an empty llama.py"):
        main(folder, "alice")
    assert Path("alice.zip").read_bytes() == before
    assert sorted(os.listdir()) == ["alice.zip", "work"]


@unix
@pytest.mark.parametrize("target", ["/etc/hostname", "absent"])
def test_links_are_not_followed(folder, target):
    (folder / "stories42M.pt").symlink_to("/etc/hostname")  # left out, so it does no harm
    main(folder, "alice")
    assert members("alice.zip") == {f"alice/{name}" for name in REQUIRED}
    (folder / "notes.txt").symlink_to(target)
    with pytest.raises(AssertionError, match=r"notes\.txt is a link"):
        main(folder, "bob")
    assert not Path("bob.zip").exists()


@unix
def test_the_zip_is_not_written_through_a_link(folder, tmp_path):
    (tmp_path / "precious").write_text("x")
    (tmp_path / "alice.zip").symlink_to("precious")
    with pytest.raises(AssertionError, match=r"alice\.zip is a link"):
        main(folder, "alice")
    assert (tmp_path / "precious").read_text() == "x"
    (tmp_path / "bob.zip").mkdir()
    with pytest.raises(AssertionError, match=r"bob\.zip is a link, a folder"):
        main(folder, "bob")


@unix
def test_a_name_that_is_not_utf8_is_one_line(folder):
    Path(os.fsdecode(bytes(folder) + b"/\xff.txt")).write_text("x")
    done = subprocess.run(
        [sys.executable, ROOT / "prepare_submit.py", folder, "alice"], capture_output=True
    )
    assert done.returncode == 2
    assert b"holds the unsafe path" in done.stderr and done.stderr.count(b"\n") == 1


def write_zip(path, names, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name in names:
            archive.writestr(name, content(name.rpartition("/")[2]))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("/etc/passwd", "unsafe path '/etc/passwd'"),
        ("alice/../../evil.py", "unsafe path"),
        ("alice/..\\evil.py", "unsafe path"),
        ("C:/evil.py", "unsafe path"),
        ("bob/llama.py", "must hold one folder alice; outside it is 'bob/llama.py'"),
        ("loose.py", "outside it is 'loose.py'"),
        ("alice/../../evil/", "unsafe path"),
        ("other/", "outside it is 'other/'"),
        ("alice//llama.py", "unsafe path"),
        ("alice/./llama.py", "unsafe path"),
        ("alice/LLAMA.py", "'alice/LLAMA.py' besides 'alice/llama.py'"),
        ("alice/llama.py/", "'alice/llama.py/' besides 'alice/llama.py'"),
    ],
)
def test_unsafe_and_stray_members_are_refused(tmp_path, extra, message):
    write_zip(tmp_path / "a.zip", [f"alice/{name}" for name in REQUIRED] + [extra])
    with pytest.raises(AssertionError) as error:
        check_file(tmp_path / "a.zip", "alice")
    assert message in str(error.value)


def test_a_link_in_a_zip_is_refused(tmp_path):
    write_zip(tmp_path / "a.zip", [f"alice/{name}" for name in REQUIRED[1:]])
    with zipfile.ZipFile(tmp_path / "a.zip", "a") as archive:
        member = zipfile.ZipInfo(f"alice/{REQUIRED[0]}")
        member.external_attr = (stat.S_IFLNK | 0o644) << 16
        archive.writestr(member, "/etc/passwd")
    with pytest.raises(AssertionError, match=f"the link 'alice/{REQUIRED[0]}'"):
        check_file(tmp_path / "a.zip", "alice")


def test_what_macos_adds_is_not_counted(tmp_path):
    added = ["__MACOSX/alice/._llama.py", "__MACOSX/._alice", "alice/.DS_Store"]
    write_zip(tmp_path / "a.zip", [f"alice/{name}" for name in REQUIRED] + added)
    check_file(tmp_path / "a.zip", "alice")


def test_too_many_bytes_are_refused_before_they_are_packed(folder, monkeypatch):
    main(folder, "bob")
    monkeypatch.setattr(prepare_submit, "MAX_BYTES", 3_000_000)
    sizes = {"data/a.csv": 2_000_000, "b.npy": 1_500_000, "c.pkl": 1_000_000, "d.txt": 100_000}
    for name, size in sizes.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(bytes(size))
    with zipfile.ZipFile("bob.zip", "a", zipfile.ZIP_DEFLATED) as archive:
        for name in sizes:
            archive.write(folder / name, f"bob/{name}")
    largest = r"[^,;]*/data/a.csv \(2,000,000\), [^,]*b.npy [^ ]*, [^,]*c.pkl \(1,000,000\);"
    for path, aid in ((folder, "alice"), ("bob.zip", "bob")):
        with pytest.raises(AssertionError, match=f"bytes, more than 3,000,000; .* {largest}"):
            main(path, aid)
    assert not Path("alice.zip").exists()


def test_damaged_zips_are_refused(tmp_path):
    path = tmp_path / "a.zip"
    path.write_bytes(b"no zip")
    with pytest.raises(AssertionError, match="no zip file"):
        check_file(path, "alice")
    write_zip(path, [f"alice/{name}" for name in REQUIRED], zipfile.ZIP_DEFLATED)
    whole = path.read_bytes()
    first = 30 + len(f"alice/{REQUIRED[0]}")  # where the first member's content begins
    last = len(whole) - 22  # where the list of members ends
    messages = []
    for place in (*range(first, first + 12), *range(last - 80, last)):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        try:
            check_file(path, "alice")
        except AssertionError as error:
            messages.append(str(error))
    assert len(messages) > 40  # there are bytes that nothing depends on
    assert any("damaged" in message for message in messages)


def test_ids_that_would_leave_the_folder_are_refused(folder):
    for aid in ("", "../x", "a/b", ".", "-x"):
        with pytest.raises(AssertionError, match="cannot name a folder"):
            main(folder, aid)
    with pytest.raises(AssertionError, match="no such file"):
        main(folder / "absent", "alice")


def test_the_unpacked_submission_generates(project, tmp_path):
    """All that a program needs but weights and data is in the zip."""
    work = tmp_path / "handed-in"
    left_out = shutil.ignore_patterns(".*", "__pycache__", "tests", "*.pt", "sst-*", "cfimdb-*")
    shutil.copytree(ROOT, work, ignore=left_out)
    for name in REQUIRED:
        if name.endswith(".txt"):
            (work / name).write_text(content(name))
    main(work, "alice")
    with zipfile.ZipFile("alice.zip") as archive:
        archive.extractall(tmp_path / "unpacked")
    command = [sys.executable, tmp_path / "unpacked/alice/run_llama.py", "--max_new_tokens", "3"]
    command += ["--pretrained-model-path", "model.pt", "--prefix", "a warm"]
    done = subprocess.run(command, cwd=project.path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\na warm") == 2
