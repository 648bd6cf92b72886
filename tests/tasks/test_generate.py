"""What a person sees of a text that is generated: as it comes, whole characters, Ctrl-C."""

import os
import re
import shlex
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, make_llama, save_llama

from minllama.common.flags import DEMO
from minllama.inference.sampling import Sampling
from minllama.kernels.quantize import DTYPES
from minllama.tasks import generate
from minllama.tasks.generate import TextGenerator, Texts

pty = pytest.importorskip("pty", reason="Windows has no pseudo-terminals")


def grown(tokenizer, ids, prompt="", stop=()):
    """What a terminal shows as ids come one by one; the writes and the text in the end."""
    generator = SimpleNamespace(llama=None, tokenizer=tokenizer)
    texts, writes = Texts(generator, [prompt], Sampling(), 99, stop), [""]
    for _ in texts._add([[token] for token in ids], [0]):
        assert texts.settled(0).startswith(writes[-1])
        writes.append(texts.settled(0))
    return writes, texts.text(0)


def test_characters_of_several_bytes_appear_whole(tokenizer):
    text = "naïve 映画 🎬 fin"
    writes, whole = grown(tokenizer, tokenizer.encode(text, bos=False, eos=False))
    assert all(text.startswith(write) for write in writes)
    assert len(set(writes)) > 8  # it did come piece by piece
    assert writes[-1] == whole == text


def test_bytes_that_are_no_character_appear_at_the_end(tokenizer):
    ids = tokenizer.encode("a", bos=False, eos=False)
    writes, whole = grown(tokenizer, [*ids, tokenizer.sp_model.piece_to_id("<0xE4>")])
    assert (writes[-1], whole) == ("a", "a\N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["d e"], "a b c "),
        (["zz", "f", "c d"], "a b "),
        (["b c"], "a b c d e f"),  # it begins in the prompt
        (["f g"], "a b c d e f"),
    ],
)
def test_a_text_ends_before_what_stops_it_and_shows_no_part_of_it(tokenizer, stop, expected):
    ids = tokenizer.encode("c d e f", bos=False, eos=False)
    writes, whole = grown(tokenizer, ids, "a b", stop)
    assert whole == expected
    assert all(whole.startswith(write) for write in writes)


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


MODEL = ["--pretrained-model-path", "model.pt", "--prefix", "a warm", "--max_new_tokens", "12"]
FILES = ["generated-sentence-temp-0.txt", "generated-sentence-temp-1.txt"]


@pytest.mark.parametrize("causal", ["--causal", "--no-causal"])
def test_one_temperature_writes_one_file(project, run_cli, causal):
    code, out, _ = run_cli(*MODEL, causal, "--temperature", "0.7", "--num_samples", "3")
    assert code == 0 and "Temperature is 0.7\n" in out
    assert [os.path.exists(name) for name in FILES] == [False, True]
    texts = (project.path / FILES[1]).read_text()
    assert f"{texts}\n---------------\nWrote generated sentences" in out
    parts = texts.split("\n---------------\n")
    assert len(parts) == len(set(parts)) == 3
    assert all(part.startswith("a warm") for part in parts)


def test_samples_are_reproducible_and_alike_at_temperature_0(project, run_cli):
    flags = [*MODEL, "--causal", "--num_samples", "2"]
    once, again = (run_cli(*flags, "--seed", "5")[1].partition("load")[2] for _ in range(2))
    assert once == again
    run_cli(*flags, "--temperature", "0", "--max_new_tokens", "8")
    one, two = (project.path / FILES[1]).read_text().split("\n---------------\n")
    assert one == two


@pytest.mark.parametrize("causal", ["--causal", "--no-causal"])
def test_filters_act_on_both_texts(project, run_cli, causal):
    """With a single candidate temperature 1 is temperature 0; a penalty changes both."""
    run_cli(*MODEL, causal, "--top_k", "1")
    low, high = ((project.path / name).read_text() for name in FILES)
    assert low == high
    run_cli(*MODEL, causal, "--top_p", "0")
    assert low == (project.path / FILES[1]).read_text()
    run_cli(*MODEL, causal, "--repetition_penalty", "1e6", "--max_new_tokens", "40")
    other = (project.path / FILES[0]).read_text()
    assert other[: len(low)] != low


@pytest.mark.parametrize("causal", ["--causal", "--no-causal"])
def test_stop_ends_the_text(project, run_cli, causal):
    run_cli(*MODEL, causal)
    whole = (project.path / FILES[0]).read_text()
    stop = whole[len("a warm") + 3 :][:2]
    run_cli(*MODEL, causal, "--stop", "no such text", stop)
    text = (project.path / FILES[0]).read_text()
    assert text == whole[: whole.index(stop, len("a warm"))]


def test_lines_are_continued_one_after_the_other(project):
    command = [sys.executable, ROOT / "run_llama.py", "--pretrained-model-path", "model.pt"]
    command += ["--causal", "--interactive", "--max_new_tokens", "5", "--temperature", "0"]
    done = subprocess.run(
        command,
        input="a warm\nfilm " + "long " * 200 + "\nthe plot",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert done.stderr.startswith("error: a prompt of ") and done.stderr.count("\n") == 1
    texts = done.stdout.split("\n", 1)[1].split("---------------\n")
    assert texts[0].startswith("a warm") and texts[1].startswith("the plot") and texts[2] == ""
    assert not any((project.path / name).exists() for name in FILES)


def test_ctrl_c_ends_a_text_and_ctrl_d_leaves(project):
    save_llama(make_llama(max_seq_len=100_000), project.path / "model.pt")
    command = [sys.executable, ROOT / "run_llama.py", "--pretrained-model-path", "model.pt"]
    command += ["--causal", "--interactive", "--max_new_tokens", "90000", "--temperature", "0"]
    terminal, end = pty.openpty()
    process = subprocess.Popen(command, stdin=end, stdout=end, stderr=end, start_new_session=True)
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
    assert b"---------------" in shown
    os.write(terminal, b"\x04")
    rest = read_all(terminal)
    assert process.wait() == 0 and b"Traceback" not in rest


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--top_k", "0"], "--top_k 0: out of range"),
        (["--top_p", "1.5"], "--top_p 1.5: out of range"),
        (["--temperature", "-1"], "--temperature -1.0: out of range"),
        (["--repetition_penalty", "0"], "--repetition_penalty 0.0: out of range"),
        (["--stop", ""], "--stop: an empty text is everywhere"),
        (["--num_samples", "0"], "--num_samples 0: out of range"),
        (["--interactive"], "--interactive: takes its texts from the input"),
        (["--option", "prompt", "--top_k", "3"], "acts only with --option generate"),
    ],
)
def test_bad_flags_are_one_line(project, run_cli, flags, complaint):
    code, _, err = run_cli(*MODEL, *flags)
    assert code == 2 and err.count("\n") == 1 and complaint in err


def test_texts_in_and_texts_out(project, tokenizer):
    """Prompts of any lengths; each is continued as it is alone. The tokenizer lies beside."""
    for causal in (True, False):
        generator = TextGenerator(project.path / "model.pt", causal=causal)
        prompts = ["a warm", "the plot is thin and the jokes are", "neither"]
        greedy = Sampling(0.0)
        together = generator.complete(prompts, greedy, 10)
        assert together == [generator.complete([p], greedy, 10)[0] for p in prompts]
        assert all(text.startswith(p) for text, p in zip(together, prompts, strict=True))


@pytest.mark.parametrize(
    ("limit", "environment", "expected"),
    [(1 << 30, {}, [1]), (1, {}, []), (1 << 30, {"OMP_NUM_THREADS": "2"}, [])],
    ids=["small", "large", "the user says"],
)
def test_a_small_model_takes_one_thread(project, monkeypatch, limit, environment, expected):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(generate, "FOR_ONE_THREAD", limit)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    TextGenerator("model.pt", causal=True, dtype="int8", may_limit_threads=True)
    assert threads == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_compiled_step_writes_the_same_texts(project, dtype):
    """The demo model's too, whose weights are float16."""
    pytest.importorskip("numba")
    for checkpoint in ("model.pt", DEMO / "model.pt"):
        plain, compiled = (
            TextGenerator(checkpoint, causal=True, dtype=dtype, compile=compile)
            for compile in (False, True)
        )
        assert type(compiled.llama) is not type(plain.llama)
        greedy = Sampling(0.0)
        texts = [each.complete(["a warm"], greedy, 12) for each in (plain, compiled)]
        assert texts[0] == texts[1]


def test_what_is_not_compiled_is_told(project, run_cli, monkeypatch):
    flags = [*project.flags[:4], "--max_new_tokens", "5", "--compile"]
    code, _, err = run_cli(*flags, "--no-causal")
    assert code == 0 and "warning: --compile: nothing is compiled without --causal" in err
    code, _, err = run_cli(*flags, "--causal", "--num_samples", "2")
    assert code == 0 and "warning: --compile: on a CPU several rows are not compiled" in err
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "minllama.kernels.compiled", raising=False)
    code, _, err = run_cli(*flags, "--causal")
    assert code == 2 and "needs Numba" in err.splitlines()[-1]


def test_bad_prompts_do_not_end_a_conversation(project):
    """Bytes that are no text, and one that is too long, each with its own line."""
    command = [sys.executable, ROOT / "run_llama.py", *project.flags[:4], "--interactive"]
    command += ["--causal", "--max_new_tokens", "8", "--num_samples", "2"]
    lines = b"\xff\na warm\n" + b"funny " * 500 + b"\nthe film"
    done = subprocess.run(
        command,
        input=lines,
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(b"error: ") == 2
    blocks = done.stdout.decode().partition("\n")[2].split("---------------\n")
    assert [block.startswith("a warm") for block in blocks[:2]] == [True, True]
    assert [block.startswith("the film") for block in blocks[2:4]] == [True, True]


def test_every_text_says_that_the_context_is_full(project):
    save_llama(make_llama(max_seq_len=24), project.path / "model.pt")
    command = [sys.executable, ROOT / "run_llama.py", "--pretrained-model-path", "model.pt"]
    command += ["--interactive", "--causal", "--max_new_tokens", "60", "--temperature", "0"]
    done = subprocess.run(command, input="a\na\n", capture_output=True, text=True)
    assert done.stderr.count("warning: the context of 24 tokens is full") == 2


@pytest.mark.parametrize("flags", [["--interactive"], ["--option", "predict", "--input", "s.txt"]])
def test_standard_input_may_be_closed(project, flags):
    (project.path / "s.txt").write_text("a warm film\n")
    command = [sys.executable, str(ROOT / "run_llama.py"), *project.flags[:4], "--causal", *flags]
    command += ["--label-names", "data/toy-label-mapping.json"]
    done = subprocess.run(f"{shlex.join(command)} <&-", shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stdout.count("\t")) == (0, 2 * ("predict" in flags)), done.stderr
