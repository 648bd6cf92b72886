"""Set-up from a folder or a URL: what is checked, what is left alone, what is said."""

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading

import pytest
from conftest import ROOT, make_llama, save_llama


@pytest.fixture
def mirror(assets, tmp_path):
    """A copy of the real folder, to spoil."""
    return shutil.copytree(assets, tmp_path / "mirror", copy_function=shutil.copyfile)


@pytest.fixture
def fetch(tmp_path):
    """Runs `fetch_assets.py` in an empty folder: `MINLLAMA_ASSETS` to (stderr, folder)."""
    folder = tmp_path / "clone"
    folder.mkdir()

    def run(base):
        done = subprocess.run(
            [sys.executable, "-m", "data.fetch_assets"],
            cwd=folder,
            env=os.environ | {"MINLLAMA_ASSETS": str(base), "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert not list(folder.rglob("*.part"))
        return done.stderr, folder

    return run


def test_fetches_everything_but_what_is_missing_and_says_so_in_one_line(mirror, fetch):
    err, folder = fetch(mirror)
    for name in ("tokenizer.model", "sanity_check.data", "data/sst-dev.txt"):
        assert (folder / name).read_bytes() == (mirror / name).read_bytes()
    assert err.startswith("missing: stories42M.pt (No such file or directory); the three checks, ")
    assert err.count("\n") == 1
    assert not (folder / "optimizer_test.npy").exists()  # the repository has its own


def test_a_second_run_leaves_files_alone_changed_ones_too(mirror, fetch):
    _, folder = fetch(mirror)
    (folder / "data/sst-dev.txt").write_text("3 ||| my own\n")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    err, _ = fetch(mirror)
    assert "data/sst-dev.txt is not the original and is left as it is" in err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_wrong_files_are_not_taken(mirror, fetch):
    (mirror / "tokenizer.model").write_text("<html>not found</html>")
    (mirror / "stories42M.pt").write_bytes(b"PK\x03\x04 truncated")
    err, folder = fetch(mirror)
    assert not (folder / "tokenizer.model").exists()
    assert not (folder / "stories42M.pt").exists()
    assert f"tokenizer.model (wrong file at {mirror}/tokenizer.model: its SHA-256 is not" in err
    assert f"stories42M.pt (wrong file at {mirror}/stories42M.pt: incomplete, only its" in err


def test_weights_of_another_shape_are_not_taken(mirror, fetch):
    save_llama(make_llama(), mirror / "stories42M.pt")
    err, folder = fetch(mirror)
    assert "a Llama of another shape than stories42M.pt" in err
    assert not (folder / "stories42M.pt").exists()


def test_broken_weights_are_fetched_again(mirror, fetch):
    weights = make_llama(dim=512, n_layers=8, n_heads=8, n_kv_heads=8, vocab_size=32000)
    save_llama(weights, mirror / "stories42M.pt")
    (mirror.parent / "clone" / "stories42M.pt").write_bytes(b"PK\x03\x04 truncated")
    err, folder = fetch(mirror)
    assert err == "stories42M.pt is broken and is fetched again\n"
    assert (folder / "stories42M.pt").read_bytes() == (mirror / "stories42M.pt").read_bytes()


def test_an_absent_folder_or_server_is_one_line(fetch, tmp_path):
    for base in (tmp_path / "absent", "http://localhost:9"):
        err, folder = fetch(base)
        assert err.startswith("missing: tokenizer.model, ") and err.count("\n") == 1
        assert not [path for path in folder.rglob("*") if path.is_file()]


def test_fetches_from_a_base_url(mirror, fetch):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=mirror)
    with http.server.ThreadingHTTPServer(("localhost", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        err, folder = fetch(f"http://localhost:{server.server_port}")
        server.shutdown()
    assert "stories42M.pt (localhost" in err and "says 404" in err
    assert (folder / "data/cfimdb-dev.txt").read_bytes() == (
        mirror / "data/cfimdb-dev.txt"
    ).read_bytes()
