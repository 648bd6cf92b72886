"""Set-up from a folder or a URL: what is checked, what is left alone, what is said."""

import contextlib
import functools
import hashlib
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

import data.fetch_assets
from config import LlamaConfig
from data.fetch_assets import fetch as fetch_file
from minllama.checkpoints.layout import shapes_of


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


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Lets a server on this machine answer as a function says; the files go to an empty folder."""
    monkeypatch.chdir(tmp_path)
    with contextlib.ExitStack() as stack:

        def serve(answer: Callable[[http.server.BaseHTTPRequestHandler], None]) -> str:
            class Handler(http.server.BaseHTTPRequestHandler):
                def do_GET(self):
                    with contextlib.suppress(OSError):  # nobody listens any more
                        answer(self)

                def log_message(self, *_args):
                    pass

            server = stack.enter_context(http.server.ThreadingHTTPServer(("localhost", 0), Handler))
            server.daemon_threads = True
            server.block_on_close = False
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            monkeypatch.setenv("MINLLAMA_ASSETS", f"http://localhost:{server.server_port}")
            return f"localhost:{server.server_port}"

        yield serve


def dribble_body(handler):
    handler.send_response(200)
    handler.end_headers()
    dribble(handler)


def dribble(handler):
    while True:
        handler.wfile.write(b"x")
        time.sleep(0.05)


@pytest.mark.parametrize("answer", [dribble_body, dribble])
def test_a_server_that_sends_single_bytes_is_given_up(served, monkeypatch, answer):
    """In its body, or before it."""
    monkeypatch.setattr(data.fetch_assets, "TIMEOUT", 0.4)
    host, unreachable, start = served(answer), {}, time.monotonic()
    reasons = [fetch_file(name, unreachable) for name in ("tokenizer.model", "data/sst-dev.txt")]
    assert time.monotonic() - start < 3
    assert reasons[0] in (f"{host} is too slow", f"no answer from {host}")
    assert reasons[0] == reasons[1]  # and not asked again
    assert os.listdir() == ["data"] and os.listdir("data") == []


@pytest.mark.parametrize("name", ["data/sst-label-mapping.json", "stories42M.pt"])
def test_a_body_without_end_is_cut(served, monkeypatch, name):
    monkeypatch.setattr(data.fetch_assets, "MOST_WEIGHTS", 1_000_000)
    sent = []

    def answer(handler):
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(bytes(1 << 16))
            sent.append(1 << 16)

    served(answer)
    assert "more than" in fetch_file(name, {})
    time.sleep(0.2)
    assert sum(sent) < 100_000_000
    assert not [file for _, _, files in os.walk(".") for file in files]


def test_redirects_in_circles_are_one_short_reason(served):
    def answer(handler):
        handler.send_response(302)
        handler.send_header("Location", handler.path)
        handler.end_headers()

    host = served(answer)
    assert fetch_file("tokenizer.model", {}) == f"{host} redirects in circles"


def test_a_whole_file_takes_its_name_and_a_link_is_not_written_through(served, monkeypatch):
    content = b"any"
    expected = (len(content), hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(data.fetch_assets.FILES, "tokenizer.model", expected)

    def answer(handler):
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(content)

    served(answer)
    with open("precious", "w") as file:
        file.write("x")
    os.symlink("precious", ".tokenizer.model.part")
    monkeypatch.setattr(data.fetch_assets, "is_wanted", lambda name: name == "tokenizer.model")
    data.fetch_assets.main()
    with open("tokenizer.model", "rb") as file, open("precious") as precious:
        assert (file.read(), precious.read()) == (content, "x")
    assert sorted(os.listdir()) == ["precious", "tokenizer.model"]


@pytest.mark.skipif(sys.platform == "win32", reason="Unix's signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_half_stays_when_it_is_stopped(served, tmp_path, number):
    served(dribble_body)
    process = subprocess.Popen(
        [sys.executable, "-m", "data.fetch_assets"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
    )
    part = tmp_path / ".tokenizer.model.part"
    while not part.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate()
    assert (process.returncode, err) == (128 + number, b"")
    assert not part.exists()


def test_what_was_left_half_is_removed_also_when_nothing_is_wanted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data.fetch_assets, "is_wanted", lambda name: False)
    (tmp_path / ".stories42M.pt.part").touch()
    data.fetch_assets.main()
    assert os.listdir() == []


@pytest.mark.parametrize(
    "sizes",
    [
        {"vocab_size": 10**12},
        {"n_layers": 10**9},
        {"hidden_dim": 2**31 - 1},
        {"multiple_of": 2**60},
    ],
)
def test_weights_of_a_huge_shape_are_refused_at_once(tmp_path, monkeypatch, sizes):
    """Each tensor is one number, said to be there often enough for the shape."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINLLAMA_ASSETS", str(tmp_path / "absent"))
    config = LlamaConfig(**sizes)
    one_layer = LlamaConfig(**sizes | {"n_layers": min(8, config.n_layers)})
    tensors = {
        name: torch.zeros(1).expand(shape)
        for name, shape in shapes_of(one_layer).items()
        if max(shape) < 2**40
    }
    model_args = {"dim": 512, "n_layers": 8, "n_heads": 8, "vocab_size": 32000} | sizes
    torch.save({"model": tensors, "model_args": model_args}, "stories42M.pt")
    done = subprocess.run(
        [sys.executable, "-m", "data.fetch_assets"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0
    assert done.stderr.startswith("stories42M.pt is broken and is fetched again\nmissing: ")
    assert done.stderr.count("\n") == 2


def test_it_has_help_and_no_other_arguments(tmp_path):
    for flags, code, told in ((["--help"], 0, ""), (["x"], 2, "error: unrecognized arguments: x")):
        for script in (["-m", "data.fetch_assets"], [ROOT / "sanity_check.py"]):
            done = subprocess.run(
                [sys.executable, *script, *flags],
                cwd=tmp_path,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
            )
            assert done.returncode == code and done.stderr.startswith(told)
            assert done.stdout.startswith("usage: ") == (code == 0)
    assert os.listdir(tmp_path) == []
