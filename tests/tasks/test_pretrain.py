"""Language-model training: its arithmetic, its folder, and going on after an interruption."""

import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import ROOT, make_llama, save_llama
from torch.utils.data import BatchSampler, RandomSampler

import minllama.tasks.pretrain
from llama import load_pretrained
from minllama.checkpoints.pt import read_checkpoint
from minllama.common.files import file_fingerprint
from minllama.common.flags import ASSIGNMENT_FLAGS
from minllama.evaluation.language_model import NextTokenScores
from minllama.tasks.pretrain import Pretraining, PretrainSettings
from minllama.text.documents import Corpus
from minllama.text.labelled import read_labelled
from minllama.text.token_files import TokenFiles
from minllama.text.tokenized import tokenize
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
    nouns, verbs = ["fox", "hen", "boy", "sun", "sea", "café"], ["saw", "met", "liked", "ran to"]
    documents = [
        "".join(
            f"The {rng.choice(nouns)} {rng.choice(verbs)} the {rng.choice(nouns)}.\n"
            for _ in range(rng.randint(1, 5))
        )
        for _ in range(200)
    ]
    (tmp_path / "text.txt").write_text("<|endoftext|>\n".join(documents))
    return tmp_path


def without(flags: list[str], flag: str) -> list[str]:
    """Flags without one of them and its value."""
    i = flags.index(flag)
    return flags[:i] + flags[i + 2 :]


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
    paths, tokens = ["text.txt"], folder / "tokens"
    texts = tokenize(Corpus(paths, (0.7, 0.15, 0.15)), tokenizer, tokens)
    settings = PretrainSettings(text=paths, batch_size=3)
    scores = Pretraining(settings, llama, texts, folder).evaluate(texts["test"])
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
    n_bytes = sum(len(document.strip().encode()) for document in documents[-len(starts) + 1 :])
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
    settings = PretrainSettings(lr=1.0, min_lr=0.1, steps=110, warmup_steps=10)
    rates = [settings.learning_rate(step) for step in range(110)]
    assert rates[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)  # half way down
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    constant = PretrainSettings(lr=1.0, min_lr=1.0, steps=110, warmup_steps=0)
    assert {constant.learning_rate(step) for step in range(110)} == {1.0}


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


def test_bfloat16_trains_float32_weights(folder, run_cli):
    assert run_cli(*SMALL)[0] == 0
    assert run_cli(*SMALL, "--dtype", "bfloat16", "--output_dir", "b")[0] == 0
    assert weights("b/model.pt")["output.weight"].dtype == torch.float32
    assert not same(weights("out/model.pt"), weights("b/model.pt"))
    assert reports("b")[-1]["test"]["loss"] == pytest.approx(reports()[-1]["test"]["loss"], abs=0.1)


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
    code, _, err = run_cli(*flags, "--max_seq_len", "129", "--output_dir", "c")
    assert code == 2 and "--max_seq_len 129: the context of start.pt is 128" in err


@pytest.mark.parametrize(("flag", "seqlen"), [([], 128), (["--max_seq_len", "32"], 32)])
def test_rows_are_as_long_as_asked_for(folder, run_cli, tokenizer_path, monkeypatch, flag, seqlen):
    save_llama(make_llama(scale=1.0), folder / "start.pt")
    (folder / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    lengths = set()
    score = Pretraining._score

    def recorded(self, batch, *more):
        lengths.add(batch[0].shape[1])
        return score(self, batch, *more)

    monkeypatch.setattr(Pretraining, "_score", recorded)
    flags = ["--option", "pretrain", "--text", "text.txt", "--steps", "2", "--batch_size", "2"]
    assert run_cli(*flags, "--pretrained-model-path", "start.pt", *flag)[0] == 0
    assert lengths == {seqlen}


def test_the_end_of_a_document_is_learned_but_not_reported():
    llama = make_llama(causal=True)
    tokens, targets = torch.randint(3, 320, (2, 16)), torch.randint(3, 320, (2, 16))
    targets[0, 5] = targets[1, 9] = 1
    logits, _ = llama(tokens, targets=targets)
    scores = NextTokenScores(logits, targets, bos_id=1)
    losses = -logits.log_softmax(-1).gather(-1, targets[..., None])
    assert scores.loss.item() == pytest.approx(losses.mean().item(), rel=1e-5)
    n_targets, n_correct, nats = scores.sums.tolist()
    assert n_targets == 30
    assert n_correct == ((logits.argmax(-1) == targets) & (targets != 1)).sum()
    assert nats == pytest.approx(losses[..., 0][targets != 1].sum().item(), rel=1e-5)


@pytest.fixture
def token_files(folder, tokenizer, tokenizer_path) -> list[str]:
    """The ids of the text in three files, one of them ending within a row."""
    ids = []
    for document in (folder / "text.txt").read_text().split("<|endoftext|>\n"):
        ids += tokenizer.encode(document.strip(), bos=True, eos=False)
    (folder / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    cuts = (0, len(ids) // 3, len(ids) // 3 + 5, len(ids))
    for i, (start, end) in enumerate(itertools.pairwise(cuts)):
        (folder / f"part{i}.bin").write_bytes(np.array(ids[start:end], "<u2").tobytes())
    return ["part0.bin", "part1.bin", "part2.bin"]


def of_tokens(token_files: list[str]) -> list[str]:
    i = SMALL.index("--text")
    flags = [*SMALL[:i], "--text", *token_files, *SMALL[i + 2 :]]
    return [*without(flags, "--vocab_size"), "--tokenizer-path", "tokenizer.model"]


def test_files_of_ids_are_trained_on(folder, run_cli, token_files):
    flags = [*of_tokens(token_files), "--steps", "150", "--lr", "1e-2"]
    code, out, err = run_cli(*flags)
    assert (code, err) == (0, "")
    assert not (folder / "out/tokens").exists()
    n_ids = sum((folder / name).stat().st_size for name in token_files) // 2
    assert f"train: {round(n_ids * 0.7):,} tokens" in out
    *steps, last = reports()
    assert steps[-1]["validation"]["loss"] < steps[0]["validation"]["loss"] - 1
    assert last["test"]["bits_per_byte"] < 3
    whole = np.concatenate([np.fromfile(name, "<u2") for name in token_files])
    whole.tofile("whole.bin")
    assert run_cli(*flags, "--text", "whole.bin", "--output_dir", "b")[0] == 0
    assert same(weights("out/model.pt"), weights("b/model.pt"))


def test_files_of_ids_are_gone_on_with(folder, run_cli, token_files, monkeypatch):
    flags = of_tokens(token_files)
    assert run_cli(*flags, "--output_dir", "whole")[0] == 0

    def interrupted(*args, **kwargs):
        if args[3] == "step 16":
            raise KeyboardInterrupt
        return update(*args, **kwargs)

    update = minllama.tasks.pretrain.update
    with monkeypatch.context() as patch:
        patch.setattr(minllama.tasks.pretrain, "update", interrupted)
        assert run_cli(*flags)[0] == 130
    code, out, _ = run_cli(*flags)
    assert (code, "continuing from step 10" in out) == (0, True)
    assert same(weights("out/model.pt"), weights("whole/model.pt"))
    np.fromfile("part2.bin", "<u2")[::-1].tofile("part2.bin")
    code, _, err = run_cli(*flags)
    assert (code, "files was" in err) == (2, True)


def test_large_files_of_ids_are_not_read_whole(folder, run_cli, token_files, monkeypatch):
    """Of 24 MB: samples for the fingerprint and for bits per byte, and the rows."""
    with open("part1.bin", "r+b") as file:
        file.truncate(24_000_000)
    n_read = 0
    get = TokenFiles.__getitem__

    def counted(self, where):
        nonlocal n_read
        ids = get(self, where)
        n_read += len(ids)
        return ids

    monkeypatch.setattr(TokenFiles, "__getitem__", counted)
    n_rows, flags = 5 * 4, [*of_tokens(token_files), "--split", "1", "0", "0", "--steps", "5"]
    assert run_cli(*flags)[0] == 0
    assert n_read == 256 * 4097 + n_rows * 17
    assert "continuing from step 5" in run_cli(*flags)[1]
    files = json.loads((folder / "out/pretrain.json").read_text())["files"]
    assert [len(file.split()) for file in files] == [2, 3, 2, 2]  # one is sampled
    assert files[0] == file_fingerprint("part0.bin")


def test_an_id_that_is_no_piece_is_one_line(folder, run_cli, token_files):
    ids = np.fromfile("part2.bin", "<u2")
    ids[-9] = 400
    ids.tofile("part2.bin")
    code, _, err = run_cli(*of_tokens(token_files))
    assert (code, err.count("\n")) == (2, 1)
    assert f"part2.bin: id 400 at position {len(ids) - 9} (from 0), but the tokenizer" in err
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--text", "part0.bin", "text.txt"], "--text text.txt: stands among files of token ids"),
        (["--text", "empty.bin"], "empty.bin: an empty file"),
        (["--text", "part0.bin", "odd.bin"], "odd.bin: its 11 bytes are no whole number of ids"),
        (["--text", "absent.bin"], "absent.bin: no such file"),
        (["--text", "bos.bin"], "bos.bin: 100 ids leave no text for train"),
        (["--split", "1", "0.0001", "0"], "ids leave no text for validation"),
    ],
)
def test_bad_files_of_ids_are_one_line(folder, run_cli, token_files, flags, complaint):
    (folder / "empty.bin").write_bytes(b"")
    (folder / "odd.bin").write_bytes(b"\1" * 11)
    (folder / "bos.bin").write_bytes(b"\1\0" * 100)
    code, _, err = run_cli(*of_tokens(token_files), *flags)
    assert (code, err.count("\n")) == (2, 1)
    assert complaint in err
    assert not (folder / "out").exists()


def test_ids_of_a_run_are_not_lost_to_it(folder, run_cli, token_files):
    """A folder without a model is cleared before a run with other settings begins."""
    assert run_cli(*SMALL)[0] == 0
    for name in ("model.pt", "state.pt"):
        (folder / "out" / name).unlink()
    before = (folder / "out/tokens/train.bin").read_bytes()
    flags = [*of_tokens(["out/tokens/train.bin"]), "--tokenizer-path", "out/tokenizer.model"]
    code, _, err = run_cli(*flags)
    assert (code, "a file of the run in out; name another --output_dir" in err) == (2, True)
    assert (folder / "out/tokens/train.bin").read_bytes() == before
    assert run_cli(*flags, "--output_dir", "b")[0] == 0


def test_files_of_ids_need_their_tokenizer(folder, run_cli, token_files):
    code, _, err = run_cli(*SMALL, "--text", *token_files)
    assert (code, err.count("\n")) == (2, 1)
    assert "part0.bin: token ids need the tokenizer that made them" in err


def test_every_flag_is_one_of_a_runs_settings(folder):
    """Else a run could be continued with another value of it."""
    flags = set(PretrainSettings.defaults()) - set(ASSIGNMENT_FLAGS)
    flags |= {"seed", "batch_size", "lr"}
    # Of the text and the checkpoint there are fingerprints; the others change no result.
    flags -= {"text", "tokenizer_path", "output_dir", "causal", "activation_checkpointing"}
    flags -= {"shard", "compile", "verify", "plot"}
    settings = PretrainSettings(text=["text.txt"]).fingerprint()
    assert settings.keys() == {*flags, "files"}


def test_labelled_sentences_are_a_text(project, run_cli):
    flags = [*without(SMALL, "--vocab_size"), "--tokenizer-path", "tokenizer.model"]
    assert run_cli(*flags, "--text", "data/toy-train.txt", "--steps", "5")[0] == 0
    sentences = [sentence for _, sentence in read_labelled("data/toy-train.txt")]
    index = json.loads((project.path / "out/tokens/index.json").read_text())
    n_bytes = sum(index[part]["n_bytes"] for part in ("train", "validation", "test"))
    assert n_bytes == sum(len(sentence.encode()) for sentence in sentences)


@pytest.mark.parametrize(
    ("stop", "flags"),
    [(10, []), (15, ["--grad_accum", "3"]), (39, ["--dtype", "bfloat16", "--batch_size", "30"])],
)
def test_an_interrupted_run_goes_on_to_the_same_weights(folder, run_cli, monkeypatch, stop, flags):
    flags = [*SMALL, *flags]
    assert run_cli(*flags, "--output_dir", "whole")[0] == 0

    def interrupted(*args, **kwargs):
        if args[3] == f"step {stop + 1}":
            raise KeyboardInterrupt
        return update(*args, **kwargs)

    update = minllama.tasks.pretrain.update
    with monkeypatch.context() as patch:
        patch.setattr(minllama.tasks.pretrain, "update", interrupted)
        code, _, err = run_cli(*flags)
        assert code == 130
        assert "the same command continues" in err
    code, out, _ = run_cli(*flags)
    assert code == 0
    assert f"continuing from step {stop // 10 * 10}" in out
    assert same(weights("out/model.pt"), weights("whole/model.pt"))
    states = [read_checkpoint(f"{name}/state.pt") for name in ("out", "whole")]
    assert same(states[0]["model"], states[1]["model"])

    def without_times(path):
        return [
            {k: r.get(k) for k in ("step", "train", "validation", "test")} for r in reports(path)
        ]

    assert without_times("out") == without_times("whole")


@pytest.mark.parametrize("batch_size", [1, 7, 64, 5000])
def test_the_order_is_that_of_torchs_samplers(folder, tokenizer, batch_size):
    """And stays it, so that a run from before goes on as it would have."""
    paths = ["text.txt"]
    texts = tokenize(Corpus(paths, (1, 0, 0)), tokenizer, folder / "tokens")
    ids, starts = texts["train"].ids.tolist(), texts["train"].starts.tolist()
    settings = PretrainSettings(text=paths, batch_size=batch_size, max_seq_len=16, seed=3)
    expected, first_of_epoch = [], []
    for epoch in range(3):
        generator = torch.Generator().manual_seed(3 + epoch)
        offset = int(torch.randint(16, (), generator=generator))
        rows = [start for start in starts if offset]
        for start, end in itertools.pairwise([*starts, len(ids)]):
            rows += range(start + offset, end, 16)
        order = RandomSampler(rows, generator=generator)
        batches = list(BatchSampler(order, batch_size, drop_last=len(rows) >= batch_size))
        first_of_epoch.append(len(expected))
        expected += [[min(rows[i], len(ids) - 17) for i in batch] for batch in batches]
    pretraining = Pretraining(settings, make_llama(causal=True), texts, folder)
    for skip in (0, 1, first_of_epoch[1] - 1, first_of_epoch[1], first_of_epoch[2] + 1):
        ours = pretraining._batches(skip)
        for batch in expected[skip:]:
            tokens, targets = next(ours)
            assert tokens.tolist() == [ids[start : start + 16] for start in batch]
            assert targets.tolist() == [ids[start + 1 : start + 17] for start in batch]


@pytest.mark.skipif(sys.platform == "win32", reason="kills as Unix does")
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
    assert list((folder / "out").rglob(".*.tmp")) == []


def test_a_run_that_goes_on_does_not_read_the_text(folder, run_cli, monkeypatch):
    assert run_cli(*SMALL)[0] == 0
    monkeypatch.setattr("minllama.text.documents.read_chunks", None)  # is not called
    assert "continuing from step 40" in run_cli(*SMALL)[1]


def test_a_line_that_was_cut_off_is_dropped(folder, run_cli):
    assert run_cli(*SMALL)[0] == 0
    before = reports()
    with open("out/metrics.jsonl", "a") as file:
        file.write('5\n{"step": "x"}\n{"step": 4')
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


@pytest.mark.parametrize("content", ["[]", "{", ""])
def test_settings_of_something_else_are_one_line(folder, run_cli, content):
    (folder / "out").mkdir()
    (folder / "out/pretrain.json").write_text(content)
    code, _, err = run_cli(*SMALL)
    assert code == 2
    assert err == "error: out/pretrain.json: no settings of a run; name another --output_dir\n"


def test_a_model_without_its_state_is_left_alone(folder, run_cli):
    assert run_cli(*SMALL)[0] == 0
    (folder / "out/state.pt").unlink()
    before = (folder / "out/model.pt").read_bytes()
    for flags in ([], ["--lr", "0.5"]):
        code, _, err = run_cli(*SMALL, *flags)
        assert code == 2 and err.count("\n") == 1
    assert (folder / "out/model.pt").read_bytes() == before


def test_a_mistake_before_the_first_report_can_be_corrected(folder, run_cli):
    code, _, err = run_cli(*SMALL, "--vocab_size", "9000")
    assert (code, "at most" in err) == (2, True)
    assert run_cli(*SMALL)[0] == 0


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_report(folder, run_cli, monkeypatch):
    assert run_cli(*SMALL, "--output_dir", "whole")[0] == 0
    score = Pretraining._score
    calls = []

    def broken(self, batch, *more):
        calls.append(self.llama.training)
        scores = score(self, batch, *more)
        if sum(calls) > 24 and self.llama.training:
            scores.loss = scores.loss * math.nan
        return scores

    with monkeypatch.context() as patch:
        patch.setattr(Pretraining, "_score", broken)
        code, _, err = run_cli(*SMALL)
    assert code == 2
    assert err.count("\n") == 1
    assert "the loss is nan in step 25" in err
    assert read_checkpoint("out/model.pt")["iter_num"] == 20
    assert run_cli(*SMALL)[0] == 0
    assert same(weights("out/model.pt"), weights("whole/model.pt"))


def test_a_full_disk_leaves_the_last_checkpoint(folder, run_cli):
    resource = pytest.importorskip("resource", reason="limits the size of files")
    assert run_cli(*SMALL)[0] == 0
    size = os.path.getsize("out/model.pt")
    command = [sys.executable, ROOT / "run_llama.py", *SMALL, "--output_dir", "b"]

    def run(limit):
        def limit_files():
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

        return subprocess.run(command, preexec_fn=limit_files, capture_output=True, text=True)

    # The first state has no moments of the optimizer yet: it and the model fit, the next does not.
    result = run(2 * size)
    assert result.returncode == 2
    assert result.stderr == f"error: {folder}/b/state.pt: File too large\n"
    assert load_pretrained("b/model.pt").config.causal
    assert read_checkpoint("b/state.pt")["step"] == 0
    assert list((folder / "b").rglob(".*")) == []
    assert run(-1).returncode == 0
    assert read_checkpoint("b/state.pt")["step"] == 40


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--text"], "expected at least one argument"),
        (["--text", "absent.txt"], "absent.txt: no such file"),
        (["--dim", "15"], "dim 15 is not a multiple of n_heads 2"),
        (["--n_layers", "2147483647"], "n_layers is 2147483647, expected at most 10000"),
        (["--hidden_dim", "2147483647"], "out of memory: 128.00 GiB asked for"),
        (["--grad_accum", "2147483647"], "--grad_accum 2147483647: a step would be more"),
        (["--seed", "4294967296"], "--seed 4294967296: out of range"),
        (["--steps=--"], "argument --steps: expected a value, not --"),
        (["--n_kv_heads", "3"], "n_heads 2 is not a multiple of n_kv_heads 3"),
        (["--max_seq_len", "50000"], "a context of 50000 tokens is longer than"),
        (["--vocab_size", "9000"], "the text allows at most"),
        (["--vocab_size", "3"], "the text allows no less than"),
        (["--no-causal"], "--no-causal: a language model"),
        (["--dtype", "int8"], "--dtype int8: training"),
        (["--split", "0", "1", "1"], "--split: the training part"),
        (["--split", "1", "nan", "0"], "nan"),
        (["--dropout", "1"], "dropout is 1.0"),
        (["--pretrained-model-path", "absent.pt"], "absent.pt: no such file; `bash setup.sh`"),
        (["--pretrained-model-path", "text.txt", "--tokenizer-path", "text.txt"], "leave"),
        (["--tokenizer-path", "absent.model"], "absent.model: no such file; `bash setup.sh`"),
        (["--tokenizer-path", "text.txt"], "--vocab_size: text.txt has a size of its own"),
    ],
)
def test_bad_input_is_one_line(folder, run_cli, flags, complaint):
    code, _, err = run_cli(*SMALL, *flags)
    assert code == 2
    assert err.count("\n") == 1
    assert complaint in err
    assert not (folder / "out").exists()


def test_only_one_process_trains_in_a_folder(folder, run_cli):
    command = [sys.executable, ROOT / "run_llama.py", *SMALL, "--steps", "100000"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not (folder / "out/state.pt").exists():
        time.sleep(0.05)
    try:
        code, _, err = run_cli(*SMALL, "--steps", "100000")
    finally:
        process.kill()
        process.wait()
    assert (code, err) == (2, "error: out: another process is training there\n")


def test_a_state_of_another_run_is_refused(folder, run_cli):
    assert run_cli(*SMALL)[0] == 0
    assert run_cli(*SMALL, "--seed", "5", "--output_dir", "b")[0] == 0
    (folder / "b/state.pt").replace("out/state.pt")
    code, _, err = run_cli(*SMALL)
    assert (code, "out/state.pt: not this run's" in err) == (2, True)


def test_a_validation_loss_that_is_not_finite_stops(folder, run_cli):
    flags = [*SMALL, "--steps", "1", "--warmup_steps", "0", "--lr", "2e9", "--grad_clip", "0"]
    code, _, err = run_cli(*flags)
    assert (code, err) == (2, "error: the validation loss is not finite at step 1; lower --lr\n")
    assert run_cli(*SMALL)[0] == 0  # nothing was kept of it


def test_a_tokenizer_without_bos_is_refused(folder, run_cli):
    sentencepiece.SentencePieceTrainer.train(
        input="text.txt", model_prefix="bare", vocab_size=30, bos_id=-1, minloglevel=2
    )
    flags = [*without(SMALL, "--vocab_size"), "--tokenizer-path", "bare.model"]
    code, _, err = run_cli(*flags)
    assert (code, err) == (2, "error: bare.model: a tokenizer without BOS is no Llama's\n")


def test_pretraining_needs_a_text(folder, run_cli):
    code, _, err = run_cli("--option", "pretrain")
    assert (code, "--text: pre-training needs a text" in err) == (2, True)
    (folder / "text.txt").write_text("too little\n")
    code, _, err = run_cli(*SMALL)
    assert code == 2
    assert err.count("\n") == 1


def test_a_longer_run_goes_on_where_its_rate_is_constant(folder, run_cli):
    flags = [*without(SMALL, "--steps"), "--lr", "1e-3", "--eval_every", "10"]
    constant = [*flags, "--min_lr", "1e-3", "--warmup_steps", "5"]
    assert run_cli(*constant, "--steps", "40", "--output_dir", "whole")[0] == 0
    assert run_cli(*constant, "--steps", "20")[0] == 0
    code, out, err = run_cli(*constant, "--steps", "40")
    assert (code, err) == (0, "") and "continuing from step 20 in out" in out
    assert same(weights("out/model.pt"), weights("whole/model.pt"))
    code, _, err = run_cli(*constant, "--steps", "30")  # less is another run
    assert code == 2 and "steps was 40, is 30" in err
    assert run_cli(*flags, "--steps", "20", "--output_dir", "decay")[0] == 0
    before = (folder / "decay/state.pt").read_bytes()
    code, _, err = run_cli(*flags, "--steps", "40", "--output_dir", "decay")
    assert code == 2 and "only where its rate is constant: --min_lr as --lr" in err
    assert (folder / "decay/state.pt").read_bytes() == before


def test_a_trained_state_outlives_its_model(folder, run_cli):
    assert run_cli(*SMALL)[0] == 0
    (folder / "out/model.pt").unlink()
    state = (folder / "out/state.pt").read_bytes()
    code, _, err = run_cli(*SMALL, "--lr", "1e-4")
    assert code == 2 and "lr was 0.001, is 0.0001" in err
    assert (folder / "out/state.pt").read_bytes() == state


@pytest.mark.skipif(sys.platform == "win32", reason="makes links")
@pytest.mark.parametrize("kind", ["dangling", "folder", "fifo"])
@pytest.mark.parametrize(
    "name", ["state.pt", "metrics.jsonl", "model.pt", "tokens/index.json", "tokens/train.bin"]
)
def test_what_is_no_file_in_a_run_empties_nothing(folder, run_cli, kind, name):
    assert run_cli(*SMALL)[0] == 0
    path = folder / "out" / name
    path.unlink()
    {"dangling": lambda p: p.symlink_to("nowhere"), "folder": os.mkdir, "fifo": os.mkfifo}[kind](
        path
    )
    before = {p.name: p.read_bytes() for p in (folder / "out").iterdir() if p.is_file()}
    code, _, err = run_cli(*SMALL)
    assert (code, err) == (
        2,
        f"error: out/{name}: not a file of a run; move it away, or name another folder\n",
    )
    assert {p.name: p.read_bytes() for p in (folder / "out").iterdir() if p.is_file()} == before


def test_hidden_files_of_others_stay(folder, run_cli):
    assert run_cli(*SMALL)[0] == 0
    for name in (".mine.tmp", ".model.pt.notes.tmp", "tokens/.draft.tmp"):
        (folder / "out" / name).touch()
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], stdout=-1)
    (folder / f"out/.state.pt.{int(dead.stdout)}.tmp").touch()
    run_cli(*SMALL)
    left = {str(path.relative_to(folder / "out")) for path in (folder / "out").rglob(".*.tmp")}
    assert left == {".mine.tmp", ".model.pt.notes.tmp", "tokens/.draft.tmp"}
