"""Pre-training: its loop, its folder, and resuming after an interruption."""

import copy
import itertools
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import assert_refused, diverging_at, interrupted_at, make_llama, save_llama
from filelock import FileLock

import minllama.tasks.pretrain
import utils
from llama import Llama, load_pretrained
from minllama.checkpoints.pt import read_checkpoint
from minllama.evaluation.language_model import evaluate
from minllama.tasks.pretrain import PretrainSettings
from tokenizer import Tokenizer

SMALL = ["--option", "pretrain", "--text", "text.txt", "--output_dir", "out"]
SMALL += ["--vocab_size", "300", "--dim", "16", "--n_layers", "1", "--n_heads", "2"]
SMALL += ["--max_seq_len", "16", "--batch_size", "4", "--steps", "40", "--eval_every", "10"]
SMALL += ["--dropout", "0.1"]


def write_text(folder: Path) -> None:
    """A text of 200 documents."""
    rng = random.Random(0)
    nouns, verbs = ["fox", "hen", "boy", "sun", "sea", "café"], ["saw", "met", "liked", "ran to"]
    documents = [
        "".join(
            f"The {rng.choice(nouns)} {rng.choice(verbs)} the {rng.choice(nouns)}.\n"
            for _ in range(rng.randint(1, 5))
        )
        for _ in range(200)
    ]
    (folder / "text.txt").write_text("<|endoftext|>\n".join(documents))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder with a text."""
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, run_once) -> Path:
    """A folder with a text and the run of `SMALL`, with what it printed in printed.txt."""
    path = tmp_path_factory.mktemp("pretrained")
    write_text(path)
    run_once(path, *SMALL)
    return path


@pytest.fixture
def trained(finished_run, tmp_path, monkeypatch) -> Path:
    """A copy of `finished_run`, the working folder; the run is in its folder `out`."""
    shutil.copytree(finished_run, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def without(flags: list[str], flag: str) -> list[str]:
    """Flags without one of them and its value."""
    i = flags.index(flag)
    return flags[:i] + flags[i + 2 :]


def weights(path) -> dict:
    return read_checkpoint(path)["model"]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def reports(path="out") -> list[dict]:
    return [json.loads(line) for line in Path(path, "metrics.jsonl").read_text().splitlines()]


def contents(path="out") -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in Path(path).iterdir() if p.is_file()}


# The loop


def test_the_folder_holds_a_model_for_every_other_option(trained, run_cli):
    saved = read_checkpoint("out/model.pt")
    assert saved["model_args"]["causal"] is True
    assert saved["model_args"]["vocab_size"] == Tokenizer(None, "out/tokenizer.model").n_words
    assert {"model", "model_args", "iter_num", "best_val_loss", "config"} == saved.keys()
    assert "test: loss" in Path("printed.txt").read_text()
    *steps, last = reports()
    assert [report["step"] for report in steps] == [10, 20, 30, 40]
    assert {"lr", "train", "validation", "seconds", "tokens_per_second"} < steps[0].keys()
    assert last["test"]["loss"] < steps[0]["validation"]["loss"]
    n_parameters = sum(p.numel() for p in load_pretrained("out/model.pt").parameters())
    # The matrix that embedding and head share is stored once.
    assert os.path.getsize("out/model.pt") < 1.2 * 4 * n_parameters + 20_000
    code, out, _ = run_cli("--pretrained-model-path", "out/model.pt", "--prefix", "The fox")
    assert code == 0
    assert out.count("The fox") == 3  # in the args, and two texts


def test_the_best_weights_are_kept_and_tested_not_the_last(folder, run_cli, monkeypatch):
    """The losses are scripted, so that the second of four reports is the best."""
    script, evaluated = iter((3.0, 2.0, 2.5, 2.0, 7.0)), []

    def scripted(llama, *args):
        evaluated.append(copy.deepcopy(llama.state_dict()))
        return evaluate(llama, *args) | {"loss": next(script)}

    monkeypatch.setattr(minllama.tasks.pretrain, "evaluate", scripted)
    assert run_cli(*SMALL)[0] == 0
    saved = read_checkpoint("out/model.pt")
    assert (saved["iter_num"], saved["best_val_loss"].item()) == (20, 2.0)
    best, last, tested = (evaluated[i] for i in (1, 3, 4))
    assert same(saved["model"], best) and same(tested, best) and not same(last, best)


def test_learning_rate_warms_up_and_decays():
    settings = PretrainSettings(lr=1.0, min_lr=0.1, steps=110, warmup_steps=10)
    rates = [settings.learning_rate(step) for step in range(110)]
    assert rates[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)  # half way down
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


def test_only_matrices_decay(folder, run_cli):
    assert run_cli(*SMALL, "--steps", "10", "--weight_decay", "0")[0] == 0
    plain = weights("out/model.pt")
    assert run_cli(*SMALL, "--steps", "10", "--weight_decay", "2", "--output_dir", "b")[0] == 0
    decayed = weights("b/model.pt")
    for name in plain:
        shrunk = decayed[name].norm() < 0.999 * plain[name].norm()
        assert shrunk == (plain[name].dim() == 2), name


def test_accumulated_batches_are_one_large_batch(folder, run_cli):
    flags = [*SMALL, "--dropout", "0", "--split", "1", "0", "0", "--steps", "5"]
    assert run_cli(*flags, "--batch_size", "8")[0] == 0
    assert run_cli(*flags, "--batch_size", "2", "--grad_accum", "4", "--output_dir", "b")[0] == 0
    large, small = weights("out/model.pt"), weights("b/model.pt")
    for name in large:
        torch.testing.assert_close(large[name], small[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("is_fast", [True, False])
def test_bfloat16_trains_float32_weights(trained, run_cli, monkeypatch, is_fast):
    """Where the CPU has no fast bfloat16 products, it trains as in float32, and says so."""
    monkeypatch.setattr(utils, "has_fast_bfloat16", lambda device: is_fast)
    code, _, err = run_cli(*SMALL, "--dtype", "bfloat16", "--output_dir", "b")
    assert code == 0 and err.count("no fast bfloat16 products") == (0 if is_fast else 1)
    assert weights("b/model.pt")["output.weight"].dtype == torch.float32
    assert same(weights("out/model.pt"), weights("b/model.pt")) is not is_fast
    assert reports("b")[-1]["test"]["loss"] == pytest.approx(reports()[-1]["test"]["loss"], abs=0.1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_can_be_stored_in_half_the_bytes(folder, run_cli, dtype):
    assert run_cli(*SMALL, "--steps", "1", "--save_dtype", dtype)[0] == 0
    assert weights("out/model.pt")["norm.weight"].dtype == getattr(torch, dtype)
    assert load_pretrained("out/model.pt").norm.weight.dtype == torch.float32


def test_a_checkpoint_is_trained_further(folder, run_cli, tokenizer_path, monkeypatch):
    llama = make_llama(scale=1.0)
    save_llama(llama, folder / "start.pt")
    shutil.copy(tokenizer_path, "tokenizer.model")
    lengths, forward = set(), Llama.forward

    def recorded(self, tokens, *args):
        lengths.add(tokens.shape[1])
        return forward(self, tokens, *args)

    monkeypatch.setattr(Llama, "forward", recorded)
    flags = ["--option", "pretrain", "--text", "text.txt", "--output_dir", "out"]
    flags += ["--pretrained-model-path", "start.pt", "--split", "1", "0", "0"]
    assert run_cli(*flags, "--steps", "1", "--lr", "0")[0] == 0
    assert same(weights("out/model.pt"), llama.state_dict())
    assert lengths == {128}
    lengths.clear()
    flags += ["--max_seq_len", "32", "--split", "0.7", "0", "0.3", "--lr", "1e-2"]
    assert run_cli(*flags, "--steps", "60", "--output_dir", "b")[0] == 0
    assert max(lengths) == 32
    first, *_, last = reports("b")
    assert last["test"]["loss"] < first["train"]["loss"] - 1
    args = read_checkpoint("b/model.pt")["model_args"]
    assert (args["max_seq_len"], args["causal"]) == (128, True)
    assert_refused(
        run_cli(*flags, "--max_seq_len", "129", "--output_dir", "c"), "--max_seq_len 129"
    )


# Files of token ids


@pytest.fixture
def token_files(folder, tokenizer, tokenizer_path) -> list[str]:
    """The ids of the text in three files, one of them ending within a sequence."""
    ids = []
    for document in (folder / "text.txt").read_text().split("<|endoftext|>\n"):
        ids += tokenizer.encode(document.strip(), bos=True, eos=False)
    shutil.copy(tokenizer_path, "tokenizer.model")
    cuts = (0, len(ids) // 3, len(ids) // 3 + 5, len(ids))
    names = ["part0.bin", "part1.bin", "part2.bin"]
    for name, (start, end) in zip(names, itertools.pairwise(cuts), strict=True):
        Path(name).write_bytes(np.array(ids[start:end], "<u2").tobytes())
    return names


def with_tokens(token_files: list[str]) -> list[str]:
    """The flags of `SMALL` with other texts and their tokenizer."""
    flags = [*without(SMALL, "--vocab_size"), "--tokenizer-path", "tokenizer.model"]
    return [*flags, "--text", *token_files]


def test_files_of_ids_are_trained_on_and_resumed(folder, run_cli, token_files):
    flags = with_tokens(token_files)
    np.concatenate([np.fromfile(name, "<u2") for name in token_files]).tofile("whole.bin")
    assert run_cli(*flags, "--text", "whole.bin", "--output_dir", "whole")[0] == 0
    with interrupted_at(16):
        assert run_cli(*flags)[0] == 130
    code, out, _ = run_cli(*flags)
    assert code == 0 and "step 10/" not in out and "step 20/" in out
    assert same(weights("out/model.pt"), weights("whole/model.pt"))
    assert not Path("out/tokens").exists()
    n_ids = os.path.getsize("whole.bin") // 2
    assert f"train: {round(n_ids * 0.7):,} tokens" in out
    assert reports()[-1]["test"]["bits_per_byte"] < 8
    np.fromfile("part2.bin", "<u2")[::-1].tofile("part2.bin")
    assert_refused(run_cli(*flags), "files")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--text", "part0.bin", "text.txt"], "token ids"),
        (["--text", "empty.bin"], "empty.bin"),
        (["--text", "odd.bin"], "odd.bin"),
        (["--text", "absent.bin"], "absent.bin"),
        (["--text", "bos.bin"], "bos.bin"),
        (["--text", "large.bin"], "large.bin"),
        (["--split", "1", "0.0001", "0"], "validation"),
    ],
)
def test_bad_files_of_ids_are_one_line(folder, run_cli, token_files, flags, named):
    Path("empty.bin").write_bytes(b"")
    Path("odd.bin").write_bytes(b"\1" * 11)
    Path("bos.bin").write_bytes(b"\1\0" * 100)
    np.array([1, 9, 9, 9, 9, 400, *[9] * 500], "<u2").tofile("large.bin")
    assert_refused(run_cli(*with_tokens(token_files), *flags), named)
    assert not Path("out").exists()


def test_ids_of_a_run_are_not_lost_to_it(trained, run_cli):
    """A folder without a model is cleared before a run with other settings begins."""
    for name in ("model.pt", "state.pt", "metrics.jsonl"):
        Path("out", name).unlink()
    before = Path("out/tokens/train.bin").read_bytes()
    flags = [*with_tokens(["out/tokens/train.bin"]), "--tokenizer-path", "out/tokenizer.model"]
    assert_refused(run_cli(*flags), "out/tokens/train.bin", "--output_dir")
    assert Path("out/tokens/train.bin").read_bytes() == before
    assert run_cli(*flags, "--output_dir", "b")[0] == 0


def test_files_of_ids_need_their_tokenizer(folder, run_cli, token_files):
    assert_refused(run_cli(*SMALL, "--text", *token_files), "--tokenizer-path")


# Resuming


@pytest.mark.parametrize(
    ("stop", "flags"),
    [(11, []), (16, ["--grad_accum", "3"]), (40, ["--dtype", "bfloat16", "--batch_size", "30"])],
)
def test_an_interrupted_run_ends_with_the_same_weights_and_reports(folder, run_cli, stop, flags):
    flags = [*SMALL, *flags]
    assert run_cli(*flags, "--output_dir", "whole")[0] == 0
    with interrupted_at(stop):
        code, _, err = run_cli(*flags)
    assert code == 130 and err.count("\n") == 1
    code, out, _ = run_cli(*flags)
    assert code == 0 and f"step {(stop - 1) // 10 * 10}/" not in out
    assert same(weights("out/model.pt"), weights("whole/model.pt"))
    states = [read_checkpoint(f"{name}/state.pt") for name in ("out", "whole")]
    assert same(states[0]["model"], states[1]["model"])
    names = ("step", "train", "validation", "test")
    ours, theirs = ([[r.get(k) for k in names] for r in reports(p)] for p in ("out", "whole"))
    assert ours == theirs


def test_a_longer_run_continues_one_with_a_constant_rate(folder, run_cli):
    flags = [*without(SMALL, "--steps"), "--lr", "1e-3", "--eval_every", "10"]
    constant = [*flags, "--min_lr", "1e-3", "--warmup_steps", "5"]
    assert run_cli(*constant, "--steps", "40", "--output_dir", "whole")[0] == 0
    assert run_cli(*constant, "--steps", "20")[0] == 0
    code, out, err = run_cli(*constant, "--steps", "40")
    assert (code, err) == (0, "") and "step 20/" not in out
    assert same(weights("out/model.pt"), weights("whole/model.pt"))
    assert_refused(run_cli(*constant, "--steps", "30"), "steps")  # less is another run
    assert run_cli(*flags, "--steps", "20", "--output_dir", "decay")[0] == 0
    before = contents("decay")
    assert_refused(run_cli(*flags, "--steps", "40", "--output_dir", "decay"), "--min_lr")
    assert contents("decay") == before


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_report(trained, run_cli):
    flags = [*SMALL, "--output_dir", "b"]
    with diverging_at(24):
        assert_refused(run_cli(*flags), "nan", "step 25")
    assert read_checkpoint("b/model.pt")["iter_num"] == 20
    assert run_cli(*flags)[0] == 0
    assert same(weights("b/model.pt"), weights("out/model.pt"))
    with diverging_at(1):
        assert_refused(run_cli(*flags[:-1], "c", "--steps", "1"), "evaluation loss is nan")
    assert run_cli(*flags[:-1], "c", "--steps", "2")[0] == 0  # nothing was kept of it


# The folder of a run


def test_a_line_that_was_cut_off_is_dropped(trained, run_cli):
    before = reports()
    with open("out/metrics.jsonl", "a") as file:
        file.write('5\n{"step": "x"}\n{"step": 4')
    assert run_cli(*SMALL)[0] == 0
    assert [r.get("step") for r in reports()] == [r.get("step") for r in before]


def test_another_run_is_not_overwritten(trained, run_cli):
    before = contents()
    assert_refused(run_cli(*SMALL, "--lr", "0.5"), "lr", "0.001", "0.5")
    assert contents() == before
    text = Path("text.txt").read_text()
    Path("text.txt").write_text("another text " * 500)
    assert_refused(run_cli(*SMALL), "files")
    assert contents() == before
    Path("text.txt").write_text(text)
    Path("out/model.pt").unlink()  # its state is as precious
    assert_refused(run_cli(*SMALL, "--lr", "1e-4"), "lr")
    assert contents() == {name: x for name, x in before.items() if name != "model.pt"}


def test_a_model_without_its_state_is_left_alone(trained, run_cli):
    Path("out/state.pt").unlink()
    before = contents()
    for flags in ([], ["--lr", "0.5"]):
        assert_refused(run_cli(*SMALL, *flags), "out")
        assert contents() == before


def test_a_folder_of_something_else_is_left_alone(folder, run_cli):
    Path("tokenizer.model").write_text("precious")
    assert_refused(run_cli(*SMALL, "--output_dir", "."), "--output_dir")
    assert Path("tokenizer.model").read_text() == "precious"
    assert_refused(run_cli(*SMALL, "--output_dir", "text.txt"), "text.txt")


@pytest.mark.parametrize("content", ["[]", "{", ""])
def test_settings_of_something_else_are_one_line(folder, run_cli, content):
    Path("out").mkdir()
    Path("out/pretrain.json").write_text(content)
    assert_refused(run_cli(*SMALL), "out/pretrain.json")


def test_a_mistake_before_the_first_report_can_be_corrected(folder, run_cli):
    with interrupted_at(5):
        assert run_cli(*SMALL)[0] == 130
    assert_refused(run_cli(*SMALL, "--vocab_size", "9000"), "9000")
    assert run_cli(*SMALL, "--vocab_size", "310", "--steps", "2")[0] == 0


def test_only_one_process_trains_in_a_folder(trained, run_cli):
    with FileLock("out/.lock"):
        assert_refused(run_cli(*SMALL), "out: another process")


def test_a_state_of_another_run_is_refused(trained, run_cli):
    saved = read_checkpoint("out/state.pt")
    torch.save(saved | {"run": saved["run"] | {"seed": 5}}, "out/state.pt")
    assert_refused(run_cli(*SMALL), "out/state.pt")


# Bad input


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--text"], "--text"),
        (["--text", "absent.txt"], "absent.txt"),
        (["--text", "short.txt"], "error: "),
        (["--dim", "15"], "dim 15"),
        (["--n_layers", "2147483647"], "n_layers is 2147483647"),
        (["--hidden_dim", "2147483647"], "out of memory"),
        (["--grad_accum", "2147483647"], "--grad_accum 2147483647"),
        (["--n_kv_heads", "3"], "n_kv_heads 3"),
        (["--max_seq_len", "50000"], "50000"),
        (["--vocab_size", "9000"], "9000"),
        (["--vocab_size", "3"], "3"),
        (["--vocab_size", "2147483647"], "out of range"),
        (["--min_lr", "0.01"], "--min_lr 0.01: greater than --lr 0.001"),
        (["--warmup_steps", "41"], "--warmup_steps 41: more than --steps"),
        (["--no-causal"], "--no-causal"),
        (["--dtype", "int8"], "--dtype int8"),
        (["--split", "0", "1", "1"], "--split"),
        (["--split", "1", "nan", "0"], "nan"),
        (["--dropout", "1"], "dropout"),
        (["--pretrained-model-path", "absent.pt"], "bash setup.sh"),
        (["--pretrained-model-path", "text.txt", "--tokenizer-path", "text.txt"], "--vocab_size"),
        (["--tokenizer-path", "absent.model"], "bash setup.sh"),
        (["--tokenizer-path", "text.txt"], "--vocab_size"),
    ],
)
def test_bad_input_is_one_line(folder, run_cli, flags, named):
    Path("short.txt").write_text("too little\n")
    assert_refused(run_cli(*SMALL, *flags), named)
    assert not Path("out").exists()


def test_pretraining_needs_a_text_and_a_tokenizer_with_bos(folder, run_cli):
    assert_refused(run_cli("--option", "pretrain"), "--text")
    sentencepiece.SentencePieceTrainer.train(
        input="text.txt", model_prefix="bare", vocab_size=30, bos_id=-1, minloglevel=2
    )
    flags = [*without(SMALL, "--vocab_size"), "--tokenizer-path", "bare.model"]
    assert_refused(run_cli(*flags), "bare.model", "BOS")
