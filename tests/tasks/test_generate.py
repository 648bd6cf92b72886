"""What a user sees of generated text: streaming, flags and their files, the chat loop, Ctrl-C."""

import io
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_refused, make_llama, save_llama

pty = pytest.importorskip("pty", reason="Windows has no pseudo-terminals")

COMMAND = [sys.executable, str(ROOT / "run_llama.py"), "--pretrained-model-path", "model.pt"]
MODEL = ["--pretrained-model-path", "model.pt", "--prefix", "a warm", "--max_new_tokens", "12"]
FILES = ["generated-sentence-temp-0.txt", "generated-sentence-temp-1.txt"]
LINE = "---------------\n"


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


def run_on_terminal(command: list[str]) -> str:
    """Run a command whose standard output and error are a terminal; return what it shows."""
    terminal, end = pty.openpty()
    process = subprocess.Popen(command, stdout=end, stderr=end)
    os.close(end)
    shown = read_all(terminal).decode().replace("\r\n", "\n")
    assert process.wait() == 0
    return shown


@pytest.mark.parametrize("causal", ["--causal", "--no-causal"])
def test_a_terminal_and_a_pipe_get_the_same_text(project, causal):
    command = [*COMMAND, "--prefix", "a warm", "--max_new_tokens", "30", causal]
    piped = subprocess.run(command, capture_output=True, text=True)
    lines = piped.stderr.splitlines()
    report = r"\d+ tokens, \d+\.\d\d s, [\d.]+ tokens/s, peak memory \d\.\d\d GiB"
    assert len(lines) == 2 and all(re.fullmatch(report, line) for line in lines)
    shown = run_on_terminal(command)
    assert re.sub(rf"(?m)^{report}\n", "", shown) == piped.stdout


def test_a_full_context_is_a_warning_after_the_text_and_a_long_prompt_an_error(project):
    save_llama(make_llama(max_seq_len=24), project.path / "model.pt")
    command = [*COMMAND, "--causal", "--max_new_tokens", "30", "--prefix"]
    shown = run_on_terminal([*command, "a"])
    text = (project.path / FILES[0]).read_text()
    assert f"\n{text}\nwarning: the context of 24 tokens is full; stopped after" in shown
    done = subprocess.run([*command, "a warm " * 30], capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(r"error: a prompt of \d+ tokens does not fit the .*\n", done.stderr)


@pytest.mark.parametrize("causal", ["--causal", "--no-causal"])
def test_ctrl_c_ends_the_text_and_writes_it(project, causal):
    """The context is so large that generation still runs when the signal comes."""
    save_llama(make_llama(max_seq_len=100_000), project.path / "model.pt")
    terminal, stdout = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "--prefix", "a warm", "--max_new_tokens", "90000", causal],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        # A background job of a shell ignores the signal, and so do its children.
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
    text = (project.path / FILES[0]).read_text()
    assert text.startswith("a warm") and len(text) > 100
    assert text in shown.decode().replace("\r\n", "\n")
    assert not (project.path / FILES[1]).exists()


@pytest.mark.parametrize("causal", ["--causal", "--no-causal"])
def test_samples_at_one_temperature_go_to_one_file(project, run_cli, causal):
    flags = [*MODEL, causal, "--num_samples", "3", "--temperature"]
    code, out, _ = run_cli(*flags, "0.7")
    assert code == 0 and "Temperature is 0.7\n" in out
    assert [os.path.exists(name) for name in FILES] == [False, True]
    texts = (project.path / FILES[1]).read_text()
    assert f"{texts}\n{LINE}Wrote generated sentences" in out
    samples = texts.split(f"\n{LINE}")
    assert len(samples) == len(set(samples)) == 3
    assert all(sample.startswith("a warm") for sample in samples)
    assert run_cli(*flags, "0.7")[1] == out
    run_cli(*flags, "0")
    assert len(set((project.path / FILES[1]).read_text().split(f"\n{LINE}"))) == 1


@pytest.mark.parametrize("causal", ["--causal", "--no-causal"])
def test_filters_and_stops_act_on_both_texts(project, run_cli, causal):
    """With a single candidate temperature 1 is temperature 0; a penalty changes both."""

    def texts(*flags):
        assert run_cli(*MODEL, causal, *flags)[0] == 0
        return [(project.path / name).read_text() for name in FILES]

    low, high = texts()
    assert low != high
    assert texts("--top_k", "1") == texts("--top_p", "0") == [low, low]
    penalized = texts("--repetition_penalty", "1e6", "--max_new_tokens", "40")
    assert not penalized[0].startswith(low)
    stop = low[len("a warm") + 3 :][:2]
    assert texts("--stop", "no such text", stop)[0] == low[: low.index(stop, len("a warm"))]


def test_each_line_of_the_input_is_continued_and_bad_ones_are_refused(project):
    """Bytes that are no text and a prompt that is too long do not end the chat loop."""
    flags = ["--interactive", "--causal", "--max_new_tokens", "8", "--num_samples", "2"]
    done = subprocess.run(
        [*COMMAND, *flags],
        input=b"\xff\na warm\r" + b"funny " * 500 + b"\nthe film",
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(b"error: ") == done.stderr.count(b"\n") == 2
    texts = done.stdout.decode().split("\n", 1)[1].split(LINE)
    assert all(text.startswith("a warm") for text in texts[:2])
    assert all(text.startswith("the film") for text in texts[2:4])
    assert texts[4:] == [""]
    assert not any((project.path / name).exists() for name in FILES)


def test_ctrl_c_ends_a_text_and_ctrl_d_the_chat_loop(project):
    save_llama(make_llama(max_seq_len=100_000), project.path / "model.pt")
    flags = ["--causal", "--interactive", "--max_new_tokens", "90000", "--temperature", "0"]
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, *flags], stdin=end, stdout=end, stderr=end, start_new_session=True
    )
    os.close(end)
    shown = b""
    while b"> " not in shown.partition(b"leaves")[2]:
        shown += os.read(terminal, 4096)
    os.write(terminal, b"a warm\n")
    while len(shown) < 4000:
        shown += os.read(terminal, 4096)
    process.send_signal(signal.SIGINT)
    shown = b""
    while not shown.endswith(b"> "):
        shown += os.read(terminal, 4096)
    assert LINE.strip().encode() in shown
    os.write(terminal, b"\x04")
    rest = read_all(terminal)
    assert process.wait() == 0 and b"Traceback" not in rest


def test_compiling_is_refused_or_left_out_in_one_line(project, run_cli, monkeypatch):
    flags = [*project.flags[:4], "--max_new_tokens", "5", "--compile"]
    for more in (["--no-causal"], ["--causal", "--num_samples", "2"]):
        code, _, err = run_cli(*flags, *more)
        assert code == 0 and err.startswith("warning: ") and err.count("warning: ") == 1


@pytest.mark.parametrize(
    ("package", "flags"),
    [
        ("numba", ["--compile", "--causal", "--max_new_tokens", "5"]),
        ("matplotlib", ["--option", "finetune", "--plot", "x.svg"]),
    ],
)
def test_a_package_that_does_not_import_is_refused_before_the_work(
    project, run_cli, monkeypatch, package, flags
):
    (project.path / "broken" / package).mkdir(parents=True)
    code = 'raise ImportError("it needs NumPy 2.4 or less")'
    (project.path / "broken" / package / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(project.path / "broken")
    for name in list(sys.modules):
        if name.split(".")[0] == package or name == "minllama.kernels.compiled":
            monkeypatch.delitem(sys.modules, name)
    code, out, err = run_cli(*project.flags, *flags)
    assert_refused((code, out, err), "it needs NumPy 2.4 or less", "check its version")
    assert "load" not in out.partition("\n")[2]


@pytest.mark.parametrize("variable", ["NUMBA_NUM_THREADS=0", "NUMBA_DISABLE_JIT=1"])
def test_settings_of_numba_that_do_not_compile_are_refused(project, variable):
    pytest.importorskip("numba")
    name, value = variable.split("=")
    command = [*COMMAND, "--causal", "--compile", "--max_new_tokens", "5"]
    done = subprocess.run(command, env=os.environ | {name: value}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: --compile")


@pytest.mark.parametrize("causal", ["--causal", "--no-causal"])
@pytest.mark.parametrize(
    "flags",
    [
        ["--temperature", "0"],
        ["--temperature", "1", "--top_k", "5"],
        ["--interactive"],
        ["--option", "prompt"],
        ["--option", "predict", "--input", "s.txt"],
    ],
)
def test_scores_that_are_not_finite_are_refused(project, run_cli, monkeypatch, causal, flags):
    """The weights are finite, but their products are not."""
    llama = make_llama()
    torch.nn.init.constant_(llama.norm.weight, 3e38)
    save_llama(llama, project.path / "model.pt")
    Path("s.txt").write_text("a warm film\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("a warm\na film\n"))
    before = sorted(os.listdir())
    code, _, err = run_cli(*project.flags, *flags, causal)
    assert (code, err) == (2, "error: the model's scores are not finite; take other weights\n")
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("flags", [["--interactive"], ["--option", "predict", "--input", "s.txt"]])
def test_standard_input_may_be_closed(project, flags):
    (project.path / "s.txt").write_text("a warm film\n")
    command = [*COMMAND, "--causal", "--label-names", "data/toy-label-mapping.json", *flags]
    done = subprocess.run(f"{shlex.join(command)} <&-", shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stdout.count("\t")) == (0, 2 * ("predict" in flags)), done.stderr
