"""The whole program: what a completed copy of the assignment writes, flags, files, bad input."""

import json
import os
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SENTENCES, assert_refused, diverging_at, make_llama, save_llama
from sklearn.metrics import confusion_matrix, f1_score

import minllama.common.flags
import minllama.tasks.generate
from llama import Llama
from minllama.checkpoints.pt import read_checkpoint

DECIMAL = re.compile(r"\d\.\d{3}\b")  # a loss or an accuracy; equal but for float rounding
PROMPT = "Is this movie bad, fair, or good? This movie is"


def expected_outputs(log):
    """The files that a log's run wrote."""
    return re.findall(r"_out': '([^']+)'", log)


@pytest.mark.parametrize(
    ("option", "flags", "files"),
    [
        ("generate", [], ["generated-sentence-temp-0.txt", "generated-sentence-temp-1.txt"]),
        (
            "prompt",
            ["--batch_size", "10"],
            ["sst-dev-prompting-output.txt", "sst-test-prompting-output.txt"],
        ),
        (
            "finetune",
            ["--epochs", "4", "--lr", "1e-2", "--batch_size", "16"],
            ["sst-dev-finetuning-output.txt", "sst-test-finetuning-output.txt"],
        ),
    ],
)
def test_logs_and_files_are_the_references(
    real_assets, assets, tmp_path, monkeypatch, run_cli, option, flags, files
):
    """Every random draw has its part in these, and every printed character."""
    expected = real_assets("expected")
    for name in ("tiny.pt", "data"):
        (tmp_path / name).symlink_to(expected / name)
    (tmp_path / "tokenizer.model").symlink_to(assets / "tokenizer.model")
    if option != "generate":
        for split in ("train", "dev", "test"):
            flags = [*flags, f"--{split}", f"data/sst-{split}.txt"]
        flags = [*flags, "--label-names", "data/sst-label-mapping.json"]
        flags = [*flags, "--dev_out", files[0], "--test_out", files[1]]
    flags = ["--option", option, "--pretrained-model-path", "tiny.pt", *flags]
    monkeypatch.chdir(tmp_path)
    code, out, err = run_cli(*flags)
    assert code == 0
    speed = r"(75 tokens, .* tokens/s, peak memory .* GiB\n){2}" if option == "generate" else ""
    assert re.fullmatch(speed, err)
    ours, theirs = out.strip(), (expected / f"{option}.log").read_text().strip()
    assert DECIMAL.sub("x", ours) == DECIMAL.sub("x", theirs)
    numbers = [[float(n) for n in DECIMAL.findall(text)] for text in (ours, theirs)]
    assert numbers[0] == pytest.approx(numbers[1], abs=2e-3)
    for name in files:
        assert (tmp_path / name).read_text() == (expected / name).read_text()


def test_generate_prints_and_writes_the_same_text(project, run_cli):
    code, out, _ = run_cli(
        "--pretrained-model-path", "model.pt", "--prefix", "a warm", "--max_new_tokens", "6"
    )
    assert code == 0
    low = (project.path / "generated-sentence-temp-0.txt").read_text()
    high = (project.path / "generated-sentence-temp-1.txt").read_text()
    assert low.startswith("a warm") and high.startswith("a warm") and low != high
    lines = "load model from model.pt\nTemperature is {}\n{}\n---------------\n"
    lines += "Wrote generated sentence to generated-sentence-temp-{}.txt.\n"
    assert out.split("\n", 1)[1] == lines.format(0.0, low, 0) + lines.format(1.0, high, 1)


def test_generation_reads_the_flags(project, run_cli):
    def low(*flags):
        assert run_cli("--pretrained-model-path", "model.pt", *flags)[0] == 0
        return (project.path / "generated-sentence-temp-0.txt").read_text()

    assert low("--max_new_tokens", "0") == minllama.tasks.generate.PREFIX
    assert low("--max_new_tokens", "0", "--max_sentence_len", "4") == "I ha"
    assert low("--prefix", "", "--max_new_tokens", "0") == ""
    flags = ["--prefix", "a", "--max_new_tokens", "9"]
    assert low(*flags, "--causal") != low(*flags, "--no-causal") == low(*flags)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_lower_precision_generates_and_prompts(project, run_cli, dtype):
    for mode in ("--causal", "--no-causal"):
        flags = [*project.flags, mode, "--dtype", dtype]
        assert run_cli(*flags, "--max_new_tokens", "5")[0] == 0
        assert run_cli("--option", "prompt", *flags)[0] == 0
        predictions = (project.path / "toy-dev-prompting-output.txt").read_text()
        assert predictions.count("\n") == 6


def test_metrics_and_report(project, run_cli):
    flags = [*project.flags, "--metrics_out", "m.jsonl", "--report"]
    code, out, _ = run_cli("--option", "finetune", *flags, "--epochs", "2", "--causal")
    assert code == 0
    code, prompted, _ = run_cli("--option", "prompt", *flags)
    assert code == 0 and ", majority-class baseline (bad) :: 0.333\n" in prompted
    lines = [json.loads(line) for line in (project.path / "m.jsonl").read_text().splitlines()]
    assert [(line["option"], line.get("epoch"), line.get("split")) for line in lines] == [
        ("finetune", 0, None),
        ("finetune", 1, None),
        ("finetune", None, "dev"),
        ("finetune", None, "test"),
        ("prompt", None, "dev"),
        ("prompt", None, "test"),
    ]
    losses = re.findall(r"train loss :: (\S+), train acc :: (\S+), dev acc :: (\S+)", out)
    for line, printed in zip(lines[:2], losses, strict=True):
        keys = ("train_loss", "train_accuracy", "dev_accuracy")
        assert tuple(f"{line[key]:.3f}" for key in keys) == printed
        assert line["train_sentences_per_second"] == pytest.approx(12 / line["train_seconds"])
        assert 0 < line["train_seconds"] < line["seconds"]
        assert line["peak_memory_bytes"] > 1e7
    assert f"dev acc :: {lines[2]['accuracy']:.3f}" in out
    predicted = [
        int(line.split(" ||| ")[0])
        for line in (project.path / "toy-test-finetuning-output.txt").read_text().splitlines()
    ]
    true = [0, 1, 2, 0, 1, 2]
    assert lines[3]["macro_f1"] == pytest.approx(f1_score(true, predicted, average="macro"))
    assert "precision" in out and "macro avg" in out
    for label, row in zip(("bad", "fair", "good"), confusion_matrix(true, predicted), strict=True):
        assert " ".join([label, *(f"{count:6d}" for count in row)]) in out


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("model.pt", "would overwrite the input model.pt"),
        ("tokenizer.model", "would overwrite the input tokenizer.model"),
        ("toy-dev-finetuning-output.txt", "would overwrite the output"),
        ("notes.md", "notes.md: not a file of JSON lines"),
        ("cut.jsonl", "cut.jsonl: not a file of JSON lines"),
        ("list.jsonl", "list.jsonl: not a file of JSON lines"),
        ("data", "data: a folder"),
        ("absent/m.jsonl", "there is no folder"),
    ],
)
def test_metrics_go_to_a_file_of_their_own(project, run_cli, path, named):
    (project.path / "notes.md").write_text("hello\n")
    (project.path / "cut.jsonl").write_text('{"option": "prompt"}\n{"opt')
    (project.path / "list.jsonl").write_text("[1]\n")
    before = {p: p.read_bytes() for p in project.path.iterdir() if p.is_file()}
    result = run_cli("--option", "finetune", *project.flags, "--metrics_out", path)
    assert_refused(result, named)
    assert {p: p.read_bytes() for p in project.path.iterdir() if p.is_file()} == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_metrics_that_cannot_be_written_cost_no_run(project, run_cli):
    code, _, err = run_cli("--option", "prompt", *project.flags, "--metrics_out", "/dev/full")
    assert code == 0 and Path("toy-dev-prompting-output.txt").is_file()
    assert "warning: /dev/full: No space left on device; a line of metrics is lost\n" in err


def test_train_need_not_be_evaluated(project, run_cli):
    """Nothing else changes: a causal evaluation draws no random numbers."""
    flags = [*project.flags, "--causal", "--epochs", "2", "--lr", "1e-3", "--metrics_out"]
    results = []
    for name, *skip in (["m"], ["n", "--skip_train_eval"]):
        code, out, _ = run_cli("--option", "finetune", *flags, name, *skip)
        assert code == 0
        assert len(re.findall("train acc ::", out)) == (0 if skip else 2)
        lines = [json.loads(line) for line in Path(name).read_text().splitlines()]
        assert [line["train_accuracy"] is None for line in lines[:2]] == 2 * [bool(skip)]
        losses = [line["train_loss"] for line in lines[:2]]
        results.append((losses, [line["confusion_matrix"] for line in lines[2:]]))
    assert results[0] == results[1]


def test_prompting_unmasked_truncates_sentence_and_question_together(project, run_cli):
    code, out, _ = run_cli("--option", "prompt", *project.flags, "--max_sentence_len", "5")
    assert code == 0
    assert re.search(
        r"load 12 data from data/toy-train.txt\nload 6 data from data/toy-dev.txt\n"
        r"load 6 data from data/toy-test.txt\ndev acc :: 0.\d{3}\ntest acc :: 0.\d{3}\n$",
        out,
    )
    lines = (project.path / "toy-dev-prompting-output.txt").read_text().splitlines()
    assert [line.split(" ||| ")[1] for line in lines] == [f"{s} . {PROMPT} " for s in SENTENCES]


@pytest.mark.parametrize("causal", ["--causal", "--no-causal"])
def test_finetuning_learns_saves_its_best_epoch_and_evaluates_it(project, run_cli, causal):
    flags = [*project.flags, "--epochs", "8", "--lr", "1e-3", causal]
    code, out, _ = run_cli("--option", "finetune", *flags)
    assert code == 0
    epochs = re.findall(
        r"(save the model to \S+\n)?epoch (\d): train loss :: ([\d.]+), "
        r"train acc :: ([\d.]+), dev acc :: ([\d.]+)\n",
        out,
    )
    assert [int(row[1]) for row in epochs] == list(range(8))
    losses, dev_accs = [float(row[2]) for row in epochs], [float(row[4]) for row in epochs]
    assert losses[-1] < 0.7 * losses[0]
    for i, row in enumerate(epochs):
        assert bool(row[0]) == (dev_accs[i] > max(dev_accs[:i], default=-1))
    assert f"\ndev acc :: {max(dev_accs):.3f}\n" in out
    saved = read_checkpoint("finetune-8-0.001.pt")
    assert {"model", "optim", "args", "model_config", "torch_rng"} <= saved.keys()
    lines = (project.path / "toy-test-finetuning-output.txt").read_text().splitlines()
    assert [line.split(" ||| ")[1] for line in lines] == [f"{s} ." for s in SENTENCES]


def test_out_files_are_named_for_data_and_option_unless_given(project, run_cli):
    def names(*flags):
        out = run_cli(*flags, "--pretrained-model-path", "absent.pt")[1]
        return expected_outputs(out.splitlines()[0])[2:]

    data = ["--dev", "data/cfimdb-dev.txt", "--test", "elsewhere/sst-test.txt"]
    for option, kind in (("prompt", "prompting"), ("finetune", "finetuning")):
        dev, test = f"cfimdb-dev-{kind}-output.txt", f"sst-test-{kind}-output.txt"
        assert names("--option", option, *data) == [dev, test]
        given = f"x-dev-{kind}-output.txt"
        assert names("--option", option, *data, "--dev_out", given) == [given, test]


BAD_FLAGS = [
    (["--epochs", "0"], "--epochs"),
    (["--batch_size", "-1"], "--batch_size"),
    (["--lr", "nan"], "--lr"),
    (["--lr", "1e300"], "--lr"),
    (["--hidden_dropout_prob", "1.5"], "--hidden_dropout_prob"),
    (["--batch_size", str(10**30)], "--batch_size"),
    (["--prefix", "a\udcff"], "not valid Unicode"),
    (["--generated_sentence_low_temp_out", "model.pt"], "would overwrite the input model.pt"),
    (["--generated_sentence_high_temp_out", "generated-sentence-temp-0.txt"], "another file"),
    (["--generated_sentence_high_temp_out", "no/x"], "folder"),
    (["--option", "prompt", "--dev_out", "dev.txt"], "dev-prompting-output.txt"),
    (["--option", "prompt", "--test_out", "no/x-test-prompting-output.txt"], "folder"),
    (["--option", "finetune", "--dev_out", "dev.txt"], "dev-finetuning-output.txt"),
    (["--option", "finetune", "--test_out", "no/x-test-finetuning-output.txt"], "folder"),
    (["--seed", "-1"], "--seed"),
    (["--seed", str(2**32)], "--seed"),
    (["--max_sentence_len", "0"], "--max_sentence_len"),
    (["--max_new_tokens", "-1"], "--max_new_tokens"),
    (["--option", "sing"], "--option"),
    (["--unknown", "1"], "--unknown"),
    (["--tokenizer-path", "absent.model"], "absent.model"),
    (["--tokenizer-path", ""], "--tokenizer-path '': expected the name of a file"),
    (["--option", "pretrain", "--text", "data/toy-dev.txt", "--pretrained-model-path", ""], "''"),
    (["--option", "prompt", "--train", "absent.txt"], "absent.txt"),
    (["--option", "prompt", "--label-names", "absent.json"], "absent.json"),
    (["--option", "finetune", "--test", "absent.txt"], "absent.txt"),
    (["--option", "prompt", "--dev", "data"], "error: data: not a file"),
    (["--option", "finetune", "--dtype", "int8"], "--dtype int8"),
    (["--top_k", "0"], "--top_k 0: out of range"),
    (["--top_p", "1.5"], "--top_p 1.5: out of range"),
    (["--temperature", "-1"], "--temperature -1.0: out of range"),
    (["--repetition_penalty", "0"], "--repetition_penalty 0.0: out of range"),
    (["--stop", ""], "--stop: an empty text"),
    (["--num_samples", "0"], "--num_samples 0: out of range"),
    (["--interactive", "--prefix", "a"], "--interactive: takes its texts from the input"),
    (["--option", "prompt", "--top_k", "3"], "acts only with --option generate"),
    (["--option", "prompt", "--calibrate", "pmi"], "--calibrate"),
    (["--option", "prompt", "--prompt_template", "x"], "--prompt_template"),
    (["--option", "prompt", "--prompt_template", "{sentence} {sentence}"], "--prompt_template"),
    (["--option", "finetune", "--calibrate", "pmi"], "acts only with --option prompt"),
    (["--option", "predict", "--input", "absent.txt"], "absent.txt: no such file"),
    (["--option", "predict", "--load", "w.pt", "--calibrate", "pmi"], "--load uses no prompt"),
    (["--option", "predict", "--save_every", "2"], "acts only with --option finetune"),
]


@pytest.mark.parametrize(("flags", "named"), BAD_FLAGS)
def test_bad_flags_are_one_line(project, run_cli, flags, named):
    before = sorted(os.listdir(project.path))
    result = run_cli(*project.flags, *flags)
    assert_refused(result, named)
    assert "load 12 data" not in result[1]
    assert sorted(os.listdir(project.path)) == before


@pytest.mark.parametrize("option", ["prompt", "finetune"])
@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_bad_data_is_found_before_any_work(project, run_cli, option, split):
    path = project.path / f"data/toy-{split}.txt"
    path.write_text(path.read_text() + "3 ||| a label too many\n")
    result = run_cli("--option", option, *project.flags)
    n_lines = 13 if split == "train" else 7
    assert_refused(result, f"data/toy-{split}.txt, line {n_lines}:", "0 to 2", "3")
    assert result[1].count("\n") == 1


@pytest.mark.parametrize("has_mapping", [True, False])
def test_the_labels_are_those_of_a_mapping_or_else_of_train(project, run_cli, has_mapping):
    """The default mapping, of other data, is absent; two of the three labels occur."""
    train = project.path / "data/toy-train.txt"
    flags = project.flags if has_mapping else project.flags[:-2]
    for split in ("train", "dev", "test"):
        path = train.with_name(f"toy-{split}.txt")
        path.write_text(path.read_text().replace("2 |||", "1 |||"))
    assert run_cli("--option", "finetune", *flags)[0] == 0
    saved = read_checkpoint("finetune-1-2e-05.pt")
    assert saved["model_config"]["num_labels"] == (3 if has_mapping else 2)


def test_another_models_tokenizer_is_refused(project, run_cli):
    save_llama(make_llama(vocab_size=100), project.path / "model.pt")
    for option in ("generate", "prompt", "finetune"):
        assert_refused(run_cli("--option", option, *project.flags), "320", "100", "model.pt")


@pytest.mark.parametrize("causal", ["--causal", "--no-causal"])
@pytest.mark.parametrize(("option", "keep"), [("prompt", "last"), ("finetune", "first")])
def test_sentences_longer_than_the_context_are_truncated_with_one_warning(
    project, run_cli, tokenizer, monkeypatch, option, keep, causal
):
    save_llama(make_llama(max_seq_len=120), project.path / "model.pt")
    long = "a warm and funny film " * 20 + "never loses"
    for split in ("train", "dev", "test"):
        path = project.path / f"data/toy-{split}.txt"
        path.write_text(f"0 ||| {long}\n1 ||| bad\n2 ||| good\n")
    seen = []
    forward = Llama.hidden_states

    def record(self, tokens, *args, **kwargs):
        seen.extend(tokens.tolist())
        return forward(self, tokens, *args, **kwargs)

    monkeypatch.setattr(Llama, "hidden_states", record)
    code, out, err = run_cli("--option", option, causal, *project.flags)
    assert code == 0 and out.count("load 3 data") >= 3
    n_examples = {"prompt": 6, "finetune": 9}[option]  # train is not prompted
    warning = re.fullmatch(
        rf"warning: {n_examples // 3} of {n_examples} sentences do not fit the context "
        rf"and were truncated to their {keep} (\d+) tokens\n",
        err,
    )
    max_len = int(warning[1])
    if option == "finetune":
        expected = tokenizer.encode(long, bos=True, eos=False)[:max_len]
    else:
        text = f"{long} {PROMPT}" if causal == "--causal" else f"{long} {PROMPT} "
        expected = [1, *tokenizer.encode(text, bos=False, eos=False)[1 - max_len :]]
    assert expected in [row[:max_len] for row in seen]


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_best(project, run_cli):
    flags = ["--option", "finetune", *project.flags, "--epochs", "2"]
    with diverging_at(4):
        assert_refused(run_cli(*flags), "nan", "epoch 1")
    saved = read_checkpoint("finetune-2-2e-05.pt")["model"]
    assert all(tensor.isfinite().all() for tensor in saved.values())
    assert run_cli(*flags)[0] == 0  # resumes
    with diverging_at(3):  # the last step
        assert_refused(run_cli(*flags, "--epochs", "1"), "scores", "--lr")


def test_the_best_weights_do_not_overwrite_the_pretrained_ones(project, run_cli):
    (project.path / "model.pt").rename(project.path / "finetune-1-2e-05.pt")
    before = (project.path / "finetune-1-2e-05.pt").read_bytes()
    flags = [*project.flags, "--pretrained-model-path", "finetune-1-2e-05.pt"]
    assert_refused(run_cli("--option", "finetune", *flags), "input finetune-1-2e-05.pt")
    assert (project.path / "finetune-1-2e-05.pt").read_bytes() == before


def test_absent_default_weights_say_what_to_run(project, run_cli, monkeypatch):
    monkeypatch.setattr(minllama.common.flags, "DEMO", project.path / "absent")
    assert_refused(run_cli(), "stories42M.pt", "bash setup.sh")


@pytest.fixture
def demo_folder(project, monkeypatch):
    """The project's model and data as the demo, and a working folder without any."""
    folder = project.path / "demo"
    folder.mkdir()
    (project.path / "model.pt").rename(folder / "model.pt")
    (project.path / "tokenizer.model").rename(folder / "tokenizer.model")
    for split in ("train", "dev", "test"):
        text = (project.path / f"data/toy-{split}.txt").read_text()
        (folder / f"reviews-{split}.txt").write_text(text)
    mapping = (project.path / "data/toy-label-mapping.json").read_text()
    (folder / "reviews-label-mapping.json").write_text(mapping)
    monkeypatch.setattr(minllama.common.flags, "DEMO", folder)
    return folder


def test_the_demo_stands_in_for_absent_defaults(project, run_cli, demo_folder):
    code, out, err = run_cli("--max_new_tokens", "3")
    assert code == 0 and out.count("load model from demo/model.pt") == 2
    assert "stories42M.pt" in err and "demo/model.pt" in err
    for option, kind in (("prompt", "prompting"), ("finetune", "finetuning")):
        code, out, err = run_cli("--option", option, "--epochs", "1")
        assert code == 0 and "load 6 data from demo/reviews-test.txt" in out
        assert "demo/reviews-train.txt" in err and "data/cfimdb-train.txt" in err
        assert (project.path / f"reviews-dev-{kind}-output.txt").exists()


def test_what_is_there_or_was_asked_for_is_not_replaced(project, run_cli, demo_folder):
    shutil.copy(demo_folder / "model.pt", "stories42M.pt")
    shutil.copy(demo_folder / "tokenizer.model", "tokenizer.model")
    assert "demo" not in run_cli("--max_new_tokens", "3")[2]
    Path("stories42M.pt").unlink()
    assert_refused(run_cli("--pretrained-model-path", "stories42M.pt"), "stories42M.pt")
    code, _, err = run_cli("--option", "prompt", "--dev", "data/toy-dev.txt")
    assert code == 2 and "error: data/cfimdb-" in err and "reviews-" not in err
    # Data that are there are not replaced by others because one of their files is absent.
    for split in ("train", "dev"):
        shutil.copy(f"data/toy-{split}.txt", f"data/cfimdb-{split}.txt")
    code, _, err = run_cli("--option", "prompt")
    assert code == 2 and "reviews-" not in err


@pytest.mark.parametrize(
    ("script", "line"),
    [
        ("rope_test.py", "Rotary embedding test passed!"),
        ("optimizer_test.py", "Optimizer test passed!"),
        ("sanity_check.py", "Your Llama implementation is correct!"),
    ],
)
def test_the_three_checks(monkeypatch, capsys, script, line):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [script])
    runpy.run_path(script, run_name="__main__")
    assert capsys.readouterr().out.startswith(f"{line}\n")


def test_the_sanity_check_fails_a_wrong_model(tmp_path, assets, monkeypatch):
    """The official data and the 42M shape, but random weights."""
    llama = make_llama(dim=512, n_layers=8, n_heads=8, n_kv_heads=8, vocab_size=32000)
    save_llama(llama, tmp_path / "stories42M.pt")
    shutil.copy(assets / "sanity_check.data", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sanity_check.py"])
    with pytest.raises(SystemExit, match="logits differ"):
        runpy.run_path(str(ROOT / "sanity_check.py"), run_name="__main__")
