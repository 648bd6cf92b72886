"""CONTRIBUTING's examples: it quotes their files, and they work in a copy of the repository."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

EXAMPLES = ROOT / "tests/contributing"
ROOMS = {"freeze_layers.py": "methods", "count.py": "tasks", "npz.py": "checkpoints"}
LINES = {  # file: what CONTRIBUTING adds to it, as the text before and after
    "minllama/methods/__init__.py": [
        (
            "from minllama.methods.learning_rates",
            "from minllama.methods.freeze_layers import FreezeLayers\n"
            "from minllama.methods.learning_rates",
        ),
        ("    EarlyStopping,\n", "    EarlyStopping,\n    FreezeLayers,\n"),
    ],
    "minllama/common/flags.py": [('"predict"', '"predict", "count"')],
    "run_llama.py": [
        (
            "from minllama.tasks.finetune",
            "from minllama.tasks.count import CountSettings, count\nfrom minllama.tasks.finetune",
        ),
        (
            '    "predict": (PredictSettings, predict),\n',
            '    "predict": (PredictSettings, predict),\n    "count": (CountSettings, count),\n',
        ),
    ],
    "minllama/checkpoints/formats.py": [
        ("llama2c, meta, pt\n", "llama2c, meta, npz, pt\n"),
        ("(hf, meta, llama2c,", "(hf, meta, llama2c, npz,"),
    ],
}


@pytest.mark.parametrize("name", ROOMS)
def test_contributing_quotes_the_file(name):
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert f"\n```python\n{(EXAMPLES / name).read_text(encoding='utf-8')}```\n" in text


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of the code with the examples and their lines."""
    copy = tmp_path_factory.mktemp("repository")
    for path in [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
        shutil.copy(path, copy)
    shutil.copytree(ROOT / "minllama", copy / "minllama")
    for name, room in ROOMS.items():
        shutil.copy(EXAMPLES / name, copy / "minllama" / room)
    for name, changes in LINES.items():
        text = (copy / name).read_text(encoding="utf-8")
        for before, after in changes:
            if after not in text:  # nobody has followed the example
                assert text.count(before) == 1, f"{name}: {before}"
                text = text.replace(before, after)
        (copy / name).write_text(text, encoding="utf-8")
    return copy


@pytest.fixture
def run(copy, project):
    """Runs the copy's command line in the project's folder; returns what it printed."""

    def run(*flags: str) -> str:
        command = [sys.executable, copy / "run_llama.py", *project.flags, *flags]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_the_examples_have_the_style_of_the_code(copy, command):
    pytest.importorskip("ruff")
    ruff = [sys.executable, "-m", "ruff", *command, "."]
    result = subprocess.run(ruff, cwd=copy, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_the_frozen_layer_does_not_train(run, project):
    run("--option", "finetune", "--freeze_layers", "1")
    (saved,) = project.path.glob("finetune-*-freeze_layers-1.pt")
    names = torch.load(saved, weights_only=True)["model"].keys()
    assert {name.split(".")[2] for name in names if ".layers." in name} == {"1"}


def test_the_new_option_counts_tokens(run, project, tokenizer):
    lines = (project.path / "data/toy-train.txt").read_text().splitlines()
    lengths = [len(tokenizer.encode(line.split(" ||| ")[1], bos=True, eos=False)) for line in lines]
    shortest = min(lengths)
    printed = run("--option", "count", "--at_least", str(shortest + 1)).splitlines()[-1]
    assert int(printed) == sum(lengths) - shortest * lengths.count(shortest)


def test_the_new_format_generates_the_same_text(run, run_cli, project):
    checkpoint = torch.load(project.path / "model.pt", weights_only=True)
    arrays = {name: tensor.numpy() for name, tensor in checkpoint["model"].items()}
    np.savez("model.npz", model_args=json.dumps(checkpoint["model_args"]), **arrays)
    text, flags = project.path / "generated-sentence-temp-1.txt", ["--temperature", "0"]
    assert run_cli(*project.flags, *flags)[0] == 0
    expected = text.read_text()
    text.unlink()
    run(*flags, "--pretrained-model-path", "model.npz")
    assert text.read_text() == expected
