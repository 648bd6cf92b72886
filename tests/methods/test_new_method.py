"""A new method is one file and one line of the list: `toy_method.py` and the fixture here."""

import os

import pytest
import torch
from conftest import assert_refused, make_llama
from methods_kit import train
from toy_method import Toy

from minllama import methods
from minllama.checkpoints.pt import read_checkpoint
from minllama.text.labelled import read_labelled

pytest_plugins = ["methods_fixtures"]

TOY = ["--toy_scale", "1.5", "--toy_penalty", "0.25"]
OUTPUTS = ["toy-dev-advanced-output.txt", "toy-test-advanced-output.txt"]


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(methods, "METHODS", (*methods.METHODS, Toy))


def test_it_is_in_help(run_cli, toy):
    code, out, _ = run_cli("--help")
    assert code == 0
    section = " ".join(out[out.index(Toy.title) :].split())
    assert "--toy_scale S initial value of the scales" in section
    assert "--toy_penalty X weight of their squared distance from it (default: 0.0)" in section


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--prompt_based", *TOY], ["--toy_scale", "--prompt_based", "nothing to scale"]),
        (["--mixout", "0.5", *TOY], ["--mixout", "--toy_scale"]),
        (["--wise_ft", "0.5", *TOY], ["--wise_ft", "--toy_scale"]),
        (["--option", "prompt", *TOY], ["--toy_penalty", "--toy_scale"]),
        (["--toy_penalty", "0.25"], ["--toy_penalty", "--toy_scale"]),
        (["--toy_scale", "-1"], ["--toy_scale -1.0"]),
        (["--toy_scale", "much"], ["--toy_scale"]),
    ],
)
def test_it_is_refused_where_it_does_not_belong(project, run_cli, toy, flags, named):
    before = sorted(os.listdir(project.path))
    assert_refused(run_cli("--option", "finetune", *project.flags, *flags), *named)
    assert sorted(os.listdir(project.path)) == before


@pytest.mark.parametrize("more", [[], ["--pooling", "mean", "--smart", "1"]])
def test_it_trains_is_saved_and_loads(project, run_cli, monkeypatch, tokenizer, more):
    flags = ["--option", "finetune", *project.flags, "--causal", "--epochs", "3", "--lr", "0.1"]
    with monkeypatch.context() as patch:
        patch.setattr(methods, "METHODS", (*methods.METHODS, Toy))
        code, out, err = run_cli(*flags, *TOY, *more)
        assert code == 0, err
        assert f"train {32 * 3 + 3 + 32} of " in out
        (path,) = project.path.glob("finetune-*-toy_scale-1.5-toy_penalty-0.25.pt")
        saved = read_checkpoint(path)
        names = {f"classifier_head.{name}" for name in ("scale", "weight", "bias")}
        assert saved["model"].keys() == names
        assert (saved["model"]["classifier_head.scale"] - 1.5).abs().min() > 1e-3
        written = [(project.path / name).read_text() for name in OUTPUTS]
        expected = [expected_predictions(project, s, saved, tokenizer) for s in ("dev", "test")]
        assert written == expected

        for name in OUTPUTS:
            (project.path / name).unlink()
        load = ["--option", "finetune", "--load", path.name]
        code, again, err = run_cli(*load)
        assert code == 0, err
        assert [(project.path / name).read_text() for name in OUTPUTS] == written
        assert out[out.index("dev acc ::", out.index("load model")) :].strip() in again
        assert_refused(run_cli(*load, "--toy_scale", "2"), "toy_scale 1.5")
    assert_refused(run_cli(*load), path.name)  # the method is gone


def expected_predictions(project, split, saved, tokenizer):
    """The file of predictions, with the saved tensors put into the formula."""
    pooling = saved["model_config"]["pooling"]
    scale, weight, bias = (
        saved["model"][f"classifier_head.{name}"] for name in ("scale", "weight", "bias")
    )
    llama = make_llama(causal=True)
    lines = []
    for _, sentence in read_labelled(project.path / f"data/toy-{split}.txt"):
        ids = tokenizer.encode(sentence, bos=True, eos=False)
        with torch.no_grad():
            hidden = llama.hidden_states(torch.tensor([ids]))[0]
        x = hidden.mean(0) if pooling == "mean" else hidden[-1]
        lines.append(f"{(weight @ (scale * x) + bias).argmax().item()} ||| {sentence}\n")
    return "".join(lines)


def test_its_penalty_acts(make_classifier, toy):
    distances = []
    for penalty in (0.0, 1e3):
        classifier = make_classifier(toy_scale=1.0, toy_penalty=penalty)
        train(classifier)
        distances.append((classifier.model.classifier_head.scale - 1).abs().max().item())
    assert 0 < distances[1] < distances[0]
