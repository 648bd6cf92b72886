"""Language-model training: its arithmetic, its folder, and going on after an interruption."""

import itertools
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, make_llama, save_llama

import pretrain
from base_llama import read_checkpoint
from corpus import tokenize
from dataset import read_labelled
from llama import load_pretrained
from pretrain import LanguageModelLoss, Pretraining, learning_rate
from tokenizer import Tokenizer

SMALL = ["--option", "pretrain", "--text", "text.txt", "--output_dir", "out"]
SMALL += ["--vocab_size", "300", "--dim", "16", "--n_layers", "1", "--n_heads", "2"]
SMALL += ["--max_seq_len", "16", "--batch_size", "4", "--steps", "40", "--eval_every", "10"]
SMALL += ["--dropout", "0.1"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a text of 200 documents."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    nouns, verbs = ["fox", "hen", "boy", "sun", "sea", "ball"], ["saw", "met", "liked", "ran to"]
    documents = [
        "".join(
            f"The {rng.choice(nouns)} {rng.choice(verbs)} the {rng.choice(nouns)}.\n"
            for _ in range(rng.randint(1, 5))
        )
        for _ in range(200)
    ]
    (tmp_path / "text.txt").write_text("<|endoftext|>\n".join(documents))
    return tmp_path


def weights(path) -> dict:
    return read_checkpoint(path)["model"]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def reports(path="out") -> list[dict]:
    with open(f"{path}/metrics.jsonl") as file:
        return [json.loads(line) for line in file]


def test_the_folder_holds_a_model_for_every_other_option(folder, run_cli):
    code, out, err = run_cli(*SMALL)
    assert (code, err) == (0, "")
    saved = read_checkpoint("out/model.pt")
    assert saved["model_args"]["causal"] is True
    assert saved["model_args"]["vocab_size"] == Tokenizer(None, "out/tokenizer.model").n_words
    assert {"model", "model_args", "iter_num", "best_val_loss", "config"} == saved.keys()
    assert "test: loss" in out
    assert (
        os.path.getsize("out/model.pt")
        < 1.2 * 4 * sum(p.numel() for p in load_pretrained("out/model.pt").parameters()) + 20_000
    )  # the matrix that embedding and head share is stored once
    code, out, _ = run_cli("--pretrained-model-path", "out/model.pt", "--prefix", "The fox")
    assert code == 0
    assert out.count("The fox") == 3  # in the args, and two texts


def test_it_learns_and_reports_it(folder, run_cli):
    assert run_cli(*SMALL, "--steps", "150", "--lr", "1e-2")[0] == 0
    *steps, last = reports()
    assert [report["step"] for report in steps] == list(range(10, 151, 10))
    first, final = steps[0]["validation"], steps[-1]["validation"]
    assert final["loss"] < first["loss"] - 1
    assert final["accuracy"] > first["accuracy"] + 0.2
    assert final["perplexity"] == pytest.approx(math.exp(final["loss"]))
    assert abs(last["test"]["loss"] - final["loss"]) < 0.3
    assert {"lr", "train", "seconds", "tokens_per_second"} < steps[0].keys()


def test_bits_per_byte_are_those_of_the_documents(folder, tokenizer):
    """Documents that fit the context, each on its own behind BOS, counted by hand."""
    llama = make_llama(causal=True)
    texts = tokenize(["text.txt"], (0.7, 0.15, 0.15), tokenizer, folder / "tokens")
    args = SimpleNamespace(
        lr=0.0, weight_decay=0.0, dtype="float32", batch_size=3, given=[], eval_batches=1
    )
    run = Pretraining(args, llama, texts, folder)
    scores = run._evaluate(texts["test"], None)
    ids, starts = texts["test"].ids.astype(np.int64), [*texts["test"].starts, len(texts["test"])]
    nats = n_correct = n_tokens = 0
    for start, end in itertools.pairwise(starts):
        row = torch.from_numpy(ids[start:end])
        with torch.no_grad():
            log_probs = llama(row[None], targets=row)[0][0].log_softmax(-1)
        nats -= sum(log_probs[i, row[i + 1]].item() for i in range(len(row) - 1))
        n_correct += sum(int(log_probs[i].argmax() == row[i + 1]) for i in range(len(row) - 1))
        n_tokens += len(row) - 1
    documents = (folder / "text.txt").read_text().split("<|endoftext|>\n")
    n_bytes = sum(len(document.strip()) for document in documents[-len(starts) + 1 :])
    assert scores["loss"] == pytest.approx(nats / n_tokens, rel=1e-5)
    assert scores["accuracy"] == pytest.approx(n_correct / n_tokens)
    assert scores["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)


def test_the_best_weights_are_kept_not_the_last(folder, run_cli):
    # So high a rate at the end that validation gets worse.
    assert run_cli(*SMALL, "--steps", "60", "--lr", "3e-2", "--min_lr", "0.5")[0] == 0
    losses = {r["step"]: r["validation"]["loss"] for r in reports()[:-1]}
    best = min(losses, key=losses.get)
    assert best != 60
    saved = read_checkpoint("out/model.pt")
    assert saved["iter_num"] == best
    assert saved["best_val_loss"].item() == pytest.approx(losses[best])


def test_learning_rate_warms_up_and_decays():
    args = SimpleNamespace(lr=1.0, min_lr=0.1, steps=110, warmup_steps=10)
    rates = [learning_rate(step, args) for step in range(110)]
    assert rates[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)  # half way down
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    constant = SimpleNamespace(lr=1.0, min_lr=1.0, steps=110, warmup_steps=0)
    assert {learning_rate(step, constant) for step in range(110)} == {1.0}


def test_only_matrices_decay(folder, run_cli):
    """With a rate of 0 for the gradient's part nothing but the decay would move a weight."""
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


def test_bfloat16_trains_float32_weights(folder, run_cli):
    assert run_cli(*SMALL)[0] == 0
    assert run_cli(*SMALL, "--dtype", "bfloat16", "--output_dir", "b")[0] == 0
    assert weights("b/model.pt")["output.weight"].dtype == torch.float32
    assert not same(weights("out/model.pt"), weights("b/model.pt"))
    assert reports("b")[-1]["test"]["loss"] == pytest.approx(reports()[-1]["test"]["loss"], abs=0.1)


def test_plain_attention_in_bfloat16_is_the_model(folder):
    llama = make_llama(causal=True, scale=1.0)
    batch = torch.randint(320, (2, 17))
    batch = batch[:, :-1], batch[:, 1:]
    exact = LanguageModelLoss(torch.device("cpu"), "float32")(batch, llama)
    allowed = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    mixed = LanguageModelLoss(torch.device("cpu"), "bfloat16")(batch, llama)
    assert mixed.item() != exact.item()
    assert mixed.item() == pytest.approx(exact.item(), rel=5e-3)
    assert torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed() == allowed


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_can_be_stored_in_half_the_bytes(folder, run_cli, dtype):
    assert run_cli(*SMALL, "--save_dtype", dtype)[0] == 0
    assert weights("out/model.pt")["norm.weight"].dtype == getattr(torch, dtype)
    assert load_pretrained("out/model.pt").norm.weight.dtype == torch.float32


def test_a_checkpoint_is_trained_further(folder, run_cli, tokenizer_path):
    llama = make_llama(scale=1.0)
    save_llama(llama, folder / "start.pt")
    (folder / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    flags = ["--option", "pretrain", "--text", "text.txt", "--output_dir", "out"]
    flags += ["--pretrained-model-path", "start.pt", "--max_seq_len", "32"]
    assert run_cli(*flags, "--steps", "1", "--lr", "0")[0] == 0
    assert same(weights("out/model.pt"), llama.state_dict())
    assert run_cli(*flags, "--steps", "60", "--lr", "1e-2", "--output_dir", "b")[0] == 0
    assert reports("b")[-1]["test"]["loss"] < reports()[-1]["test"]["loss"] - 1
    args = read_checkpoint("b/model.pt")["model_args"]
    assert (args["max_seq_len"], args["causal"]) == (128, True)


def test_labelled_sentences_are_a_text(project, run_cli):
    flags = [*SMALL, "--text", "data/toy-train.txt", "--tokenizer-path", "tokenizer.model"]
    flags.remove("--vocab_size")
    flags.remove("300")
    assert run_cli(*flags, "--steps", "5")[0] == 0
    sentences = [sentence for _, sentence in read_labelled("data/toy-train.txt")]
    index = json.loads((project.path / "out/tokens/index.json").read_text())
    assert sum(part["n_bytes"] for part in index.values()) == sum(map(len, sentences))


@pytest.mark.parametrize("stop", [10, 15, 39])
def test_an_interrupted_run_goes_on_to_the_same_weights(folder, run_cli, monkeypatch, stop):
    assert run_cli(*SMALL, "--output_dir", "whole")[0] == 0

    def interrupted(*args, **kwargs):
        if args[4] == f"step {stop + 1}":
            raise KeyboardInterrupt
        return update(*args, **kwargs)

    update = pretrain.update
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "update", interrupted)
        code, _, err = run_cli(*SMALL)
        assert code == 130
        assert "the same command goes on" in err
    code, out, _ = run_cli(*SMALL)
    assert code == 0
    assert f"going on from step {stop // 10 * 10}" in out
    assert same(weights("out/model.pt"), weights("whole/model.pt"))
    states = [read_checkpoint(f"{name}/state.pt") for name in ("out", "whole")]
    assert same(states[0]["model"], states[1]["model"])

    def without_times(path):
        return [
            {k: r.get(k) for k in ("step", "train", "validation", "test")} for r in reports(path)
        ]

    assert without_times("out") == without_times("whole")


def test_a_killed_run_goes_on_to_the_same_weights(folder):
    command = [sys.executable, ROOT / "run_llama.py", *SMALL, "--steps", "300"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def run(folder, wait):
        process = subprocess.Popen(
            [*command, "--output_dir", folder], env=environment, stdout=subprocess.DEVNULL
        )
        while wait is not None and process.poll() is None and not wait():
            time.sleep(0.01)
        if wait is not None:
            process.send_signal(signal.SIGKILL)
        return process.wait()

    assert run("whole", None) == 0
    metrics = folder / "out/metrics.jsonl"
    for n_reports in (0, 5, 17):
        code = run("out", lambda n=n_reports: metrics.exists() and len(reports()) > n)
        assert code == -signal.SIGKILL
    assert run("out", None) == 0
    assert same(weights("out/model.pt"), weights("whole/model.pt"))
    assert [r.get("step") for r in reports()] == [*range(10, 301, 10), None]


def test_a_line_that_was_cut_off_is_dropped(folder, run_cli):
    assert run_cli(*SMALL)[0] == 0
    before = reports()
    with open("out/metrics.jsonl", "a") as file:
        file.write('{"step": 4')
    assert run_cli(*SMALL)[0] == 0
    assert [r.get("step") for r in reports()] == [r.get("step") for r in before]


def test_another_run_is_not_overwritten(folder, run_cli):
    assert run_cli(*SMALL)[0] == 0
    before = (folder / "out/model.pt").read_bytes()
    code, _, err = run_cli(*SMALL, "--lr", "0.5")
    assert code == 2
    assert "lr was 0.001, is 0.5" in err
    (folder / "text.txt").write_text("another text " * 500)
    code, _, err = run_cli(*SMALL)
    assert code == 2
    assert "files was" in err
    assert (folder / "out/model.pt").read_bytes() == before


def test_a_folder_of_something_else_is_left_alone(folder, run_cli):
    (folder / "tokenizer.model").write_text("precious")
    code, _, err = run_cli(*SMALL, "--output_dir", ".")
    assert code == 2
    assert "holds other files" in err
    assert (folder / "tokenizer.model").read_text() == "precious"
    code, _, err = run_cli(*SMALL, "--output_dir", "text.txt")
    assert (code, "not a folder" in err) == (2, True)


def test_a_mistake_before_the_first_report_can_be_corrected(folder, run_cli):
    code, _, err = run_cli(*SMALL, "--vocab_size", "9000")
    assert (code, "at most" in err) == (2, True)
    assert run_cli(*SMALL)[0] == 0


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_report(folder, run_cli, monkeypatch):
    assert run_cli(*SMALL, "--output_dir", "whole")[0] == 0
    call = LanguageModelLoss.__call__
    calls = []

    def broken(self, batch, model):
        calls.append(model.training)
        value = call(self, batch, model)
        return value * math.nan if sum(calls) > 24 and model.training else value

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModelLoss, "__call__", broken)
        code, _, err = run_cli(*SMALL)
    assert code == 2
    assert err.count("\n") == 1
    assert "the loss is nan in step 25" in err
    assert read_checkpoint("out/model.pt")["iter_num"] == 20
    assert run_cli(*SMALL)[0] == 0
    assert same(weights("out/model.pt"), weights("whole/model.pt"))


def test_a_full_disk_leaves_the_last_checkpoint(folder, run_cli):
    assert run_cli(*SMALL, "--steps", "20", "--eval_every", "10")[0] == 0
    size = os.path.getsize("out/state.pt")
    for name in ("out/state.pt", "out/model.pt"):
        os.unlink(name)
    command = [sys.executable, ROOT / "run_llama.py", *SMALL, "--output_dir", "b"]

    def run(limit):
        def limit_files():
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

        return subprocess.run(command, preexec_fn=limit_files, capture_output=True, text=True)

    result = run(size // 2)  # room for the model, but not for the optimizer's state
    assert result.returncode == 2
    assert result.stderr == f"error: {folder}/b/state.pt: File too large\n"
    assert load_pretrained("b/model.pt").config.causal
    assert sorted(p.name for p in (folder / "b").iterdir() if p.name.startswith(".")) == []
    assert run(-1).returncode == 0
    assert read_checkpoint("b/state.pt")["step"] == 40


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--text"], "expected at least one argument"),
        (["--text", "absent.txt"], "absent.txt: no such file"),
        (["--dim", "15"], "dim 15 is no multiple of n_heads 2"),
        (["--n_kv_heads", "3"], "n_heads 2 is no multiple of n_kv_heads 3"),
        (["--max_seq_len", "5000000"], "longer than the training part"),
        (["--vocab_size", "9000"], "the text allows at most"),
        (["--vocab_size", "3"], "the text allows no less than"),
        (["--no-causal"], "--no-causal: a language model"),
        (["--dtype", "int8"], "--dtype int8: training"),
        (["--split", "0", "1", "1"], "--split: the training part"),
        (["--split", "1", "nan", "0"], "nan"),
        (["--dropout", "1"], "dropout is 1.0"),
        (["--pretrained-model-path", "absent.pt", "--max_seq_len", "8"], "leave that out"),
        (["--tokenizer-path", "text.txt"], "not a SentencePiece model"),
    ],
)
def test_bad_input_is_one_line(folder, run_cli, flags, complaint):
    code, _, err = run_cli(*SMALL, *flags)
    assert code == 2
    assert err.count("\n") == 1
    assert complaint in err
    assert not (folder / "out/model.pt").exists()


def test_pretraining_needs_a_text(folder, run_cli):
    code, _, err = run_cli("--option", "pretrain")
    assert (code, "--text: pre-training needs a text" in err) == (2, True)
    (folder / "text.txt").write_text("too little\n")
    code, _, err = run_cli(*SMALL)
    assert code == 2
    assert err.count("\n") == 1
