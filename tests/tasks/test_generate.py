"""What a person sees of a text that is generated: as it comes, whole characters, Ctrl-C."""

import os
import re
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, make_llama, save_llama

from tasks.generate import TextStream

pty = pytest.importorskip("pty", reason="Windows has no pseudo-terminals")


class Terminal:
    """Standard output as a terminal that remembers each write."""

    def __init__(self):
        self.writes = []

    def isatty(self):
        return True

    def write(self, text):
        self.writes.append(text)

    def flush(self):
        pass


def test_characters_of_several_bytes_appear_whole(monkeypatch, tokenizer):
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    text = "naïve 映画 🎬 fin"
    ids = tokenizer.encode(text, bos=True, eos=False)
    stream = TextStream(tokenizer)
    for n in range(1, len(ids) + 1):
        stream.show(ids[:n])
        assert text.startswith("".join(terminal.writes))
    assert len([write for write in terminal.writes if write]) > 8  # it did come piece by piece
    stream.finish(text)
    assert "".join(terminal.writes) == text + "\n"


def test_bytes_that_are_no_character_appear_at_the_end(monkeypatch, tokenizer):
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    ids = [1, *tokenizer.encode("a", bos=False, eos=False)]
    ids.append(tokenizer.sp_model.piece_to_id("<0xE4>"))
    stream = TextStream(tokenizer)
    stream.show(ids)
    assert "".join(terminal.writes) == "a"
    stream.finish(tokenizer.decode(ids))
    assert "".join(terminal.writes) == "a\N{REPLACEMENT CHARACTER}\n"


def read_all(fd) -> bytes:
    content = b""
    while True:
        try:
            block = os.read(fd, 4096)
        except OSError:  # the other end was closed
            return content
        if not block:
            return content
        content += block


@pytest.mark.parametrize("causal", ["--causal", "--no-causal"])
def test_a_terminal_and_a_pipe_get_the_same_text(project, causal):
    command = [sys.executable, ROOT / "run_llama.py", "--pretrained-model-path", "model.pt"]
    command += ["--prefix", "a warm", "--max_new_tokens", "30", causal]
    piped = subprocess.run(command, capture_output=True, text=True)
    lines = piped.stderr.splitlines()
    report = r"\d+ tokens, \d+\.\d\d s, [\d.]+ tokens/s, peak memory \d\.\d\d GiB"
    assert len(lines) == 2 and all(re.fullmatch(report, line) for line in lines)

    terminal, stdout = pty.openpty()
    process = subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE)
    os.close(stdout)
    shown = read_all(terminal).decode().replace("\r\n", "\n")
    assert process.wait() == 0
    assert shown == piped.stdout


def test_what_happens_to_the_context_is_said_behind_the_text(project):
    save_llama(make_llama(max_seq_len=24), project.path / "model.pt")
    command = [sys.executable, ROOT / "run_llama.py", "--pretrained-model-path", "model.pt"]
    command += ["--causal", "--max_new_tokens", "30", "--prefix"]
    terminal, both = pty.openpty()
    process = subprocess.Popen([*command, "a"], stdout=both, stderr=both)
    os.close(both)
    shown = read_all(terminal).decode().replace("\r\n", "\n")
    assert process.wait() == 0
    text = (project.path / "generated-sentence-temp-0.txt").read_text()
    assert f"\n{text}\nwarning: the context of 24 tokens is full; stopped after" in shown
    done = subprocess.run([*command, "a warm " * 30], capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(r"error: a prompt of \d+ tokens does not fit the .*\n", done.stderr)


@pytest.mark.parametrize("causal", ["--causal", "--no-causal"])
def test_ctrl_c_ends_the_text_and_writes_what_there_is(project, causal):
    """The context is large enough to be still at it when the signal comes."""
    save_llama(make_llama(max_seq_len=100_000), project.path / "model.pt")
    command = [sys.executable, ROOT / "run_llama.py", "--pretrained-model-path", "model.pt"]
    command += ["--prefix", "a warm", "--max_new_tokens", "90000", causal]
    terminal, stdout = pty.openpty()
    process = subprocess.Popen(
        command,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        # A job in the background of a script is told to ignore the signal, and so are its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(stdout)
    shown = b""
    while b"a warm" not in shown.partition(b"Temperature")[2] or len(shown) < 2000:
        shown += os.read(terminal, 4096)
    process.send_signal(signal.SIGINT)
    shown += read_all(terminal)
    _, err = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in err and re.search(r"\d+ tokens, .* tokens/s", err)
    text = (project.path / "generated-sentence-temp-0.txt").read_text()
    assert text.startswith("a warm") and len(text) > 100
    assert text in shown.decode().replace("\r\n", "\n")
    assert not (project.path / "generated-sentence-temp-1.txt").exists()
