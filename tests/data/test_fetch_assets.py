"""Set-up from a folder or a URL: what is checked, what is left alone, what is reported."""

import contextlib
import functools
import http.server
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest
import torch
from conftest import ROOT, make_llama, save_llama

from config import LlamaConfig
from data import fetch_assets
from minllama.checkpoints.layout import shapes_of
from minllama.common.errors import InputError


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


def test_fetches_from_a_base_url(mirror, clone, fetch_all):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=mirror)
    with http.server.ThreadingHTTPServer(("localhost", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        err = fetch_all(f"http://localhost:{server.server_port}")
        server.shutdown()
    assert "stories42M.pt (localhost" in err and "says 404" in err
    name = "data/cfimdb-dev.txt"
    assert (clone / name).read_bytes() == (mirror / name).read_bytes()


@pytest.fixture
def served(clone, monkeypatch):
    """Lets a server on this machine answer as a function says; returns its host and port."""
    with contextlib.ExitStack() as stack:

        def serve(answer: Callable[[http.server.BaseHTTPRequestHandler], None]) -> str:
            class Handler(http.server.BaseHTTPRequestHandler):
                def do_GET(self):
                    with contextlib.suppress(OSError):  # the client is gone
                        answer(self)

                def log_message(self, *_args):
                    pass

            server = stack.enter_context(http.server.ThreadingHTTPServer(("localhost", 0), Handler))
            server.daemon_threads = True
            server.block_on_close = False
            thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
            thread.start()
            stack.callback(server.shutdown)
            monkeypatch.setenv("MINLLAMA_ASSETS", f"http://localhost:{server.server_port}")
            return f"localhost:{server.server_port}"

        yield serve


def test_a_silent_server_is_asked_once(clone, served, monkeypatch):
    monkeypatch.setattr(fetch_assets, "TIMEOUT", 0.2)
    n_requests, unreachable = 0, {}

    def answer(_handler):
        nonlocal n_requests
        n_requests += 1
        time.sleep(1)

    host = served(answer)
    for name in ("tokenizer.model", "data/sst-dev.txt"):
        assert fetch_assets.fetch(name, unreachable) == f"{host}: timed out"
    assert n_requests == 1
    assert not [path for path in clone.rglob("*") if path.is_file()]


def test_a_redirect_in_circles_is_one_short_reason(served):
    def answer(handler):
        handler.send_response(302)
        handler.send_header("Location", handler.path)
        handler.end_headers()

    host = served(answer)
    assert fetch_assets.fetch("tokenizer.model", {}) == f"{host} says 302"


@pytest.mark.skipif(sys.platform == "win32", reason="Unix's signals")
def test_no_partial_file_stays_when_it_is_stopped(clone, served):
    def send_without_end(handler):
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(b"x")
            time.sleep(0.05)

    served(send_without_end)
    for number in (signal.SIGKILL, signal.SIGINT):  # the second run removes the first one's file
        process = subprocess.Popen(
            [sys.executable, "-m", "data.fetch_assets"],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
        )
        part = clone / f".tokenizer.model.{process.pid}.tmp"
        while not part.exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        process.communicate()
    assert process.returncode == 130
    assert list(clone.iterdir()) == []


@pytest.mark.parametrize(
    "sizes",
    [
        {"vocab_size": 10**12},
        {"n_layers": 10**9},
        {"hidden_dim": 2**31 - 1},
        {"multiple_of": 2**60},
    ],
)
def test_weights_of_a_huge_shape_are_refused_at_once(tmp_path, sizes):
    """Each tensor is one number, expanded to the shape."""
    config = LlamaConfig(**sizes)
    one_layer = LlamaConfig(**sizes | {"n_layers": min(8, config.n_layers)})
    tensors = {
        name: torch.zeros(1).expand(shape)
        for name, shape in shapes_of(one_layer).items()
        if max(shape) < 2**40
    }
    model_args = {"dim": 512, "n_layers": 8, "n_heads": 8, "vocab_size": 32000} | sizes
    torch.save({"model": tensors, "model_args": model_args}, tmp_path / "stories42M.pt")
    start = time.monotonic()
    with pytest.raises(InputError):
        fetch_assets.check(tmp_path / "stories42M.pt", "stories42M.pt")
    assert time.monotonic() - start < 10


def test_arguments_are_refused_before_any_work(clone, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fetch_assets.py", "x"])
    with pytest.raises(InputError, match="unrecognized arguments: x"):
        fetch_assets.main()
    assert list(clone.iterdir()) == []
