"""Pictures of trainings."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from minllama.evaluation.plot import main, read_metrics

pytest.importorskip("matplotlib")

TEXT = "the film was warm and funny, and nobody left before its end\n" * 300
PRETRAIN = ["--option", "pretrain", "--text", "text.txt", "--vocab_size", "270", "--dim", "8"]
PRETRAIN += ["--n_layers", "1", "--n_heads", "2", "--max_seq_len", "16", "--steps", "4"]
PRETRAIN += ["--tokenizer-path", "tokenizer.model"]


def plot(monkeypatch, *flags: str) -> None:
    monkeypatch.setattr(sys, "argv", ["plot", *flags])
    main()


def numbers_in(picture: str) -> list[int]:
    """Those of the confusion matrix; matplotlib writes each text into a comment."""
    axes = Path(picture).read_text().split('id="axes_3"')[1]
    texts = re.findall(r"<!-- (\d+) -->", axes)
    return [int(text) for text in texts]


def test_pretraining_is_drawn_by_itself_and_beside_another(project, run_cli, monkeypatch):
    Path("text.txt").write_text(TEXT)
    flags = [flag for flag in PRETRAIN if flag not in ("--vocab_size", "270")]
    for name in ("a", "b"):
        code, _, err = run_cli(*flags, "--output_dir", name, "--plot", f"{name}.svg")
        assert code == 0, err
    assert Path("a.svg").read_text().startswith("<?xml")
    plot(monkeypatch, "a/metrics.jsonl", "--out", "again.svg")
    assert Path("again.svg").read_bytes() == Path("a.svg").read_bytes()
    plot(monkeypatch, "a/metrics.jsonl", "b/metrics.jsonl", "--out", "both.png")
    assert Path("both.png").read_bytes().startswith(b"\x89PNG")


def test_finetuning_is_drawn_with_the_confusion_of_dev(project, run_cli, monkeypatch):
    flags = ["--option", "finetune", *project.flags, "--epochs", "2", "--metrics_out", "m.jsonl"]
    assert run_cli(*flags, "--plot", "f.svg")[0] == 0
    plot(monkeypatch, "m.jsonl", "--out", "again.svg")
    (dev,) = [record for record in read_metrics("m.jsonl") if record.get("split") == "dev"]
    n_dev = len(Path(project.flags[project.flags.index("--dev") + 1]).read_text().splitlines())
    assert sum(map(sum, dev["confusion_matrix"])) == n_dev
    right = sum(row[i] for i, row in enumerate(dev["confusion_matrix"]))
    assert right / n_dev == dev["accuracy"]
    for picture in ("f.svg", "again.svg"):
        assert numbers_in(picture) == [n for row in dev["confusion_matrix"] for n in row]
    prompt = json.loads(json.dumps(dev)) | {"option": "prompt", "confusion_matrix": [[777] * 3] * 3}
    with open("m.jsonl", "a") as file:  # what --option prompt adds is not drawn
        file.write(json.dumps(prompt) + "\n")
    plot(monkeypatch, "m.jsonl", "--out", "again.svg")
    assert numbers_in("again.svg") == numbers_in("f.svg")
    assert run_cli(*flags, "--seed", "8")[0] == 0  # adds its lines to the same file
    epochs = [record["epoch"] for record in read_metrics("m.jsonl") if "epoch" in record]
    assert epochs == [0, 1]


@pytest.mark.parametrize(
    ("content", "out", "complaint"),
    [
        ("{}\n", "x.svg", "no report of a training in it"),
        ("[1]\n", "x.svg", "line 1: no line of metrics"),
        ('{"step": 1, "train": 5}\n', "x.svg", "line 1: not what a training writes"),
        ('{"option": "finetune", "epoch": 0}\n', "x.svg", "line 1: not what a training writes"),
        ('{"confusion_matrix": [[1], [2]], "labels": ["a"]}\n', "x.svg", "not what a training"),
        ("{}\n", "x.gif", "a picture's name ends in .svg or .png"),
        ("{}\n", "absent/x.svg", "there is no folder"),
    ],
)
def test_bad_input_is_one_line(tmp_path, content, out, complaint):
    (tmp_path / "m.jsonl").write_text(content)
    command = [
        sys.executable,
        "-m",
        "minllama.evaluation.plot",
        tmp_path / "m.jsonl",
        "--out",
        tmp_path / out,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert complaint in done.stderr
    assert not (tmp_path / out).exists()


def test_a_picture_is_refused_before_the_training(project, run_cli):
    code, _, err = run_cli("--option", "finetune", *project.flags, "--plot", "x.pdf")
    assert (code, err) == (2, "error: x.pdf: a picture's name ends in .svg or .png\n")
    train = project.flags[project.flags.index("--train") + 1]
    svg = Path(train).rename("train.svg")
    flags = [str(svg) if flag == train else flag for flag in project.flags]
    code, _, err = run_cli("--option", "finetune", *flags, "--plot", "train.svg")
    assert code == 2 and "would overwrite the input" in err
    assert " ||| " in svg.read_text()
