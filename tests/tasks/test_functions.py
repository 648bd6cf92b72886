"""The assignment's functions, called from other people's code: any settings, checked at once."""

import re
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import run_llama
from classifier import LlamaEmbeddingClassifier
from llama import Llama
from minllama.checkpoints.pt import read_checkpoint
from minllama.common.errors import InputError
from minllama.text.labelled import read_labelled
from tokenizer import Tokenizer

VALUES = {
    **{split: f"data/toy-{split}.txt" for split in ("train", "dev", "test")},
    "pretrained_model_path": "model.pt",
    "label_names": None,
    "epochs": 1,
    "batch_size": 5,
    "lr": 1e-3,
    "hidden_dropout_prob": 0,
    "dev_out": "x-dev-advanced-output.txt",
    "test_out": "x-test-advanced-output.txt",
    "smart": 1,  # whole numbers for rates
    "mixout": 0,
}


class AttributeDict(dict):
    __getattr__ = dict.__getitem__


class Delegating:
    """Has attributes that neither `vars` nor `dir` lists."""

    def __getattr__(self, name):
        if name not in VALUES:
            raise AttributeError(name)
        return VALUES[name]


def slots() -> object:
    args = type("Slots", (), {"__slots__": tuple(VALUES)})()
    for name, value in VALUES.items():
        setattr(args, name, value)
    return args


KINDS = {
    "Namespace": Namespace(**VALUES),
    "class": type("Args", (), VALUES),
    "instance": type("Args", (), VALUES)(),
    "slots": slots(),
    "attribute dict": AttributeDict(VALUES),
    "dict": VALUES,
    "delegating": Delegating(),
}


@pytest.mark.parametrize("args", KINDS.values(), ids=KINDS)
def test_settings_come_from_any_object(project, args):
    torch.manual_seed(0)
    run_llama.train(args)
    (path,) = Path().glob("finetune-*.pt")  # named as the command line does
    saved = read_checkpoint(path)
    assert {n: saved["args"][n] for n in VALUES if n != "label_names"} == {
        name: value for name, value in VALUES.items() if name != "label_names"
    }
    run_llama.test(args)
    assert (project.path / "x-test-advanced-output.txt").exists()


def test_parsed_flags_keep_their_methods(project, monkeypatch):
    flags = ["--option", "finetune", *project.flags, "--tune", "lora"]
    monkeypatch.setattr(sys, "argv", ["run_llama.py", *flags])
    run_llama.train(run_llama.get_args())
    saved = read_checkpoint("finetune-1-2e-05-tune-lora.pt")
    assert all("lora" in name or "head" in name for name in saved["model"])


def test_saved_settings_are_those_of_the_class_too(project):
    model = LlamaEmbeddingClassifier(SimpleNamespace(**VALUES, option="finetune", num_labels=3))
    optimizer = torch.optim.SGD(model.parameters())
    run_llama.save_model(model, optimizer, KINDS["instance"], KINDS["slots"], "x.pt")
    saved = read_checkpoint("x.pt")
    assert saved["args"] == VALUES == saved["model_config"]


@pytest.mark.parametrize("args", [[], "finetune", {}, SimpleNamespace(learning_rate=1)])
def test_settings_without_a_known_name_are_refused(project, args):
    with pytest.raises(InputError, match="none of the settings"):
        run_llama.train(args)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"filepath": "absent/x.pt"}, "no folder"),
        ({"filepath": "model.pt"}, "overwrite the input model.pt"),
        ({"filepath": "data/toy-dev.txt"}, "overwrite the input"),
        ({"dev": "absent.txt"}, "absent.txt"),
        ({"dtype": "int8"}, "--dtype int8"),
        ({"tune": "lorra"}, "--tune lorra"),
    ],
)
def test_training_is_checked_before_it_begins(project, monkeypatch, changes, named):
    monkeypatch.setattr(Llama, "hidden_states", None)  # no step is taken
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    with pytest.raises((InputError, FileNotFoundError), match=named):
        run_llama.train(VALUES | changes)
    assert before == {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def test_writing_a_text_is_checked_before_it_is_generated(project, monkeypatch):
    monkeypatch.setattr(Llama, "hidden_states", None)
    for outfile in ("absent/g.txt", "model.pt", "tokenizer.model"):
        with pytest.raises(InputError, match=outfile):
            run_llama.generate_sentence(VALUES, "a warm", outfile)


def test_the_tokenizer_beside_the_checkpoint_is_found(project, capsys):
    (project.path / "models").mkdir()
    for name in ("model.pt", "tokenizer.model"):
        (project.path / name).rename(project.path / "models" / name)
    (project.path / "tokenizer.model").write_text("not a tokenizer")
    paths = {"pretrained_model_path": Path("models/model.pt"), "filepath": Path("best.pt")}
    args = VALUES | paths | {"max_sentence_len": 9, "lr": np.float64(1e-4)}
    run_llama.train(args)
    run_llama.test(args)
    names = {f"{split}_out": f"x-{split}-prompting-output.txt" for split in ("dev", "test")}
    names |= {"label_names": "data/toy-label-mapping.json"}
    run_llama.test_with_prompting(args | names)
    run_llama.generate_sentence(args, "a warm", "g.txt", max_new_tokens=2)
    assert capsys.readouterr().out.count("dev acc ::") == 3 and Path("g.txt").exists()
    dataset = run_llama.LlamaDataset([("a warm", 0, [1])], SimpleNamespace(**args))
    assert dataset.collate_fn(dataset)["token_ids"].shape[0] == 1


def test_the_assignments_evaluation_takes_a_devices_name(project):
    model = LlamaEmbeddingClassifier(SimpleNamespace(**VALUES, option="finetune", num_labels=3))
    data = run_llama.create_data("data/toy-dev.txt", Tokenizer(), "valid")
    dataset = run_llama.LlamaDataset(data, SimpleNamespace(max_sentence_len=None))
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, collate_fn=dataset.collate_fn)
    accuracy, *_, sentences = run_llama.model_eval(loader, model, "cpu")
    assert accuracy == run_llama.model_eval(loader, model, torch.device("cpu")).accuracy
    assert sentences == [sentence for sentence, *_ in data]


# The files of predictions


@pytest.mark.parametrize("flags", [["prompt"], ["finetune", "--prompt_based"]])
def test_a_line_break_in_a_template_keeps_one_line_for_each_sentence(project, run_cli, flags):
    template = "Review: {sentence}\nSentiment:\r\n"
    code, _, err = run_cli("--option", *flags, *project.flags, "--prompt_template", template)
    assert code == 0, err
    lines = Path("toy-dev-advanced-output.txt").read_bytes().splitlines()
    for line, example in zip(lines, read_labelled("data/toy-dev.txt"), strict=True):
        written = line.decode().partition(" ||| ")[2].rstrip()
        assert written == f"Review: {example.sentence} Sentiment:"


def test_a_test_set_without_labels_has_predictions_and_no_accuracy(project, run_cli):
    path = Path("data/toy-test.txt")
    path.write_text(re.sub(r"^\d", "-1", path.read_text(), flags=re.M))
    flags = [*project.flags, "--report", "--metrics_out", "m.jsonl"]
    for option in (["prompt"], ["finetune"], ["finetune", "--load", "finetune-1-2e-05.pt"]):
        flags = [] if "--load" in option else flags
        code, out, err = run_cli("--option", *option, *flags)
        assert code == 0 and "dev acc ::" in out
        assert "test acc" not in out and "test: every label is -1" in err
    for name in ("toy-test-prompting-output.txt", "toy-test-finetuning-output.txt"):
        assert all(line[0] in "012" for line in Path(name).read_text().splitlines())
    assert "NaN" not in Path("m.jsonl").read_text()
    lines = path.read_text().splitlines()
    path.write_text("\n".join(["0 ||| a", *lines]))  # some have labels
    for split in ("test", "dev"):
        code, _, err = run_cli("--option", "prompt", *project.flags, f"--{split}", str(path))
        assert code == 2 and re.search(r"toy-test.txt, line 2: .* found -1", err)
