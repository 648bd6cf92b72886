"""Set-up from a folder or a URL: what is checked, what is left alone, what is reported."""

import contextlib
import functools
import http.server
import os
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
from collections.abc import Iterator

import pytest
from conftest import ROOT, make_llama, save_llama

from data import fetch_assets


@pytest.fixture
def clone(tmp_path, monkeypatch):
    folder = tmp_path / "clone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def mirror(assets, tmp_path):
    """A copy of the real folder, to spoil."""
    return shutil.copytree(assets, tmp_path / "mirror", copy_function=shutil.copyfile)


@pytest.fixture
def fetch_all(clone, monkeypatch, capsys):
    """Fetches everything from a folder or base URL into the clone, and returns standard error."""

    def run(base) -> str:
        monkeypatch.setenv("MINLLAMA_ASSETS", str(base))
        fetch_assets.fetch_all()
        assert not list(clone.rglob("*.tmp"))
        return capsys.readouterr().err

    return run


def test_everything_is_fetched_and_what_is_missing_is_one_line(mirror, clone, fetch_all):
    err = fetch_all(mirror)
    for name in ("tokenizer.model", "sanity_check.data", "data/sst-dev.txt"):
        assert (clone / name).read_bytes() == (mirror / name).read_bytes()
    assert err.startswith("missing: stories42M.pt (No such file or directory); the three checks, ")
    assert err.count("\n") == 1


def test_a_second_run_leaves_files_alone_changed_ones_too(mirror, clone, fetch_all):
    fetch_all(mirror)
    (clone / "data/sst-dev.txt").write_text("3 ||| my own\n")
    before = {path: path.stat().st_mtime_ns for path in clone.rglob("*")}
    assert "data/sst-dev.txt is not the original and is left as it is" in fetch_all(mirror)
    assert {path: path.stat().st_mtime_ns for path in clone.rglob("*")} == before


def test_wrong_files_are_not_taken(mirror, clone, fetch_all):
    (mirror / "tokenizer.model").write_text("<html>not found</html>")
    (mirror / "stories42M.pt").write_bytes(b"PK\x03\x04 truncated")
    err = fetch_all(mirror)
    for name in ("tokenizer.model", "stories42M.pt"):
        assert f"{name} (wrong file at file://{mirror}/{name}: " in err
    assert err.count("\n") == 1
    save_llama(make_llama(), mirror / "stories42M.pt")
    assert "a Llama of another shape than stories42M.pt" in fetch_all(mirror)
    assert not (clone / "tokenizer.model").exists() and not (clone / "stories42M.pt").exists()


def test_broken_weights_are_fetched_again(mirror, clone, fetch_all):
    weights = make_llama(dim=512, n_layers=8, n_heads=8, n_kv_heads=8, vocab_size=32000)
    save_llama(weights, mirror / "stories42M.pt")
    (clone / "stories42M.pt").write_bytes(b"PK\x03\x04 truncated")
    assert fetch_all(mirror) == "stories42M.pt is broken and is fetched again\n"
    assert (clone / "stories42M.pt").read_bytes() == (mirror / "stories42M.pt").read_bytes()


def test_an_absent_folder_or_server_is_one_line(clone, fetch_all, tmp_path):
    for base in (tmp_path / "absent", "http://localhost:9"):
        err = fetch_all(base)
        assert err.startswith("missing: tokenizer.model, ") and err.count("\n") == 1
        assert not [path for path in clone.rglob("*") if path.is_file()]


def test_the_reason_of_a_refused_certificate_is_named(clone, fetch_all, monkeypatch):
    reason = "certificate verify failed: self-signed certificate"

    def refuse(*_args, **_kwargs):
        raise urllib.error.URLError(ssl.SSLCertVerificationError(1, reason))

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    assert f"(host: {reason})" in fetch_all("https://host")


@contextlib.contextmanager
def serving(handler) -> Iterator[str]:
    """Serve from this machine; yields the host and port."""
    with http.server.ThreadingHTTPServer(("localhost", 0), handler) as server:
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"localhost:{server.server_port}"
        server.shutdown()


def test_fetches_from_a_base_url(mirror, clone, fetch_all):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=mirror)
    with serving(handler) as host:
        assert f"stories42M.pt ({host} says 404)" in fetch_all(f"http://{host}")
    name = "data/cfimdb-dev.txt"
    assert (clone / name).read_bytes() == (mirror / name).read_bytes()


def test_a_silent_server_is_asked_once(clone, fetch_all, monkeypatch):
    monkeypatch.setattr(fetch_assets, "TIMEOUT", 0.2)
    requests = []

    class Silent(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            time.sleep(1)

    with serving(Silent) as host:
        assert fetch_all(f"http://{host}").count(f"{host}: timed out") == 1
    assert requests == ["/tokenizer.model"]
    assert not [path for path in clone.rglob("*") if path.is_file()]


class Endless(http.server.BaseHTTPRequestHandler):
    """Sends a file without end."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):  # the client is gone
            while True:
                self.wfile.write(b"x")
                time.sleep(0.05)


@pytest.mark.skipif(sys.platform == "win32", reason="Unix's signals")
def test_no_partial_file_stays_when_it_is_stopped(clone):
    """A killed run leaves one; the next run removes it."""
    with serving(Endless) as host:
        for number in (signal.SIGKILL, signal.SIGINT):
            process = subprocess.Popen(
                [sys.executable, "-m", "data.fetch_assets"],
                env=os.environ | {"PYTHONPATH": str(ROOT), "MINLLAMA_ASSETS": f"http://{host}"},
                stderr=subprocess.PIPE,
            )
            while not list(clone.glob(f".tokenizer.model.*.{process.pid}.tmp")):
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(number)
            process.communicate()
    assert process.returncode == 130
    assert list(clone.iterdir()) == []
