"""Curves of training runs."""

import json
import re
import sys
from pathlib import Path

import pytest

from minllama.common.errors import InputError
from minllama.evaluation.metrics import read_metrics
from minllama.evaluation.plot import main

pytest.importorskip("matplotlib")

PRETRAIN = ["--option", "pretrain", "--text", "text.txt", "--tokenizer-path", "tokenizer.model"]
PRETRAIN += ["--dim", "8", "--n_layers", "1", "--n_heads", "2", "--max_seq_len", "16"]
PRETRAIN += ["--steps", "4"]


def plot(monkeypatch, *flags: str) -> None:
    monkeypatch.setattr(sys, "argv", ["plot", *flags])
    main()


def matrix_in(picture: str) -> list[int]:
    """The numbers of the confusion matrix; matplotlib writes each text into a comment."""
    axes = Path(picture).read_text().split('id="axes_3"')[1]
    return [int(text) for text in re.findall(r"<!-- (\d+) -->", axes)]


def test_pretraining_is_drawn_by_itself_and_beside_another(project, run_cli, monkeypatch):
    text = "the film was warm and funny, and nobody left before its end\n" * 300
    Path("text.txt").write_text(text)
    for name in ("a", "b"):
        code, _, err = run_cli(*PRETRAIN, "--output_dir", name, "--plot", f"{name}.svg")
        assert code == 0, err
    assert Path("a.svg").read_text().startswith("<?xml")
    plot(monkeypatch, "a/metrics.jsonl", "--out", "again.svg")
    assert Path("again.svg").read_bytes() == Path("a.svg").read_bytes()
    plot(monkeypatch, "a/metrics.jsonl", "b/metrics.jsonl", "--out", "both.png")
    assert Path("both.png").read_bytes().startswith(b"\x89PNG")


def test_finetuning_is_drawn_with_the_confusion_of_dev(project, run_cli, monkeypatch):
    flags = ["--option", "finetune", *project.flags, "--epochs", "2", "--metrics_out", "m.jsonl"]
    assert run_cli(*flags, "--plot", "f.svg")[0] == 0
    (dev,) = [record for record in read_metrics("m.jsonl") if record.get("split") == "dev"]
    assert matrix_in("f.svg") == [n for row in dev["confusion_matrix"] for n in row]
    prompt = dev | {"option": "prompt", "confusion_matrix": [[777] * 3] * 3}
    with open("m.jsonl", "a") as file:  # prompting may write to the same file
        file.write(json.dumps(prompt) + "\n")
    plot(monkeypatch, "m.jsonl", "--out", "again.svg")
    assert matrix_in("again.svg") == matrix_in("f.svg")
    assert run_cli(*flags, "--seed", "8")[0] == 0  # appends another run
    epochs = [record["epoch"] for record in read_metrics("m.jsonl") if "epoch" in record]
    assert epochs == [0, 1]


@pytest.mark.parametrize(
    ("content", "out", "message"),
    [
        ("{}", "x.svg", "not the metrics of a training run"),
        ("[1]", "x.svg", "line 1: no line of metrics"),
        ('{"step": 1, "train": 5}', "x.svg", "not the metrics of a training run"),
        (
            '{"option": "finetune", "epoch": 0, "train_loss": 1, "dev_accuracy": 1}\n'
            '{"option": "finetune", "split": "dev", "labels": 1, "confusion_matrix": [[1]]}',
            "x.svg",
            "not the metrics of a training run",
        ),
        ("{}", "x.gif", "a picture's name ends in .svg or .png"),
        ("{}", "absent/x.svg", "there is no folder"),
    ],
)
def test_bad_input_is_refused(tmp_path, monkeypatch, content, out, message):
    (tmp_path / "m.jsonl").write_text(content)
    with pytest.raises(InputError, match=message):
        plot(monkeypatch, str(tmp_path / "m.jsonl"), "--out", str(tmp_path / out))
    assert not (tmp_path / out).exists()


def test_a_picture_is_refused_before_the_training_run(project, run_cli):
    code, out, err = run_cli("--option", "finetune", *project.flags, "--plot", "x.pdf")
    assert (code, err) == (2, "error: x.pdf: a picture's name ends in .svg or .png\n")
    assert "epoch" not in out.replace("epochs", "")
    Path("data/toy-train.txt").rename("train.svg")
    flags = [flag.replace("data/toy-train.txt", "train.svg") for flag in project.flags]
    code, _, err = run_cli("--option", "finetune", *flags, "--plot", "train.svg")
    assert code == 2 and "would overwrite the input" in err
    assert " ||| " in Path("train.svg").read_text()
