"""Files that version 0.1 wrote still load, and mean what they meant."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from minllama.checkpoints.pt import read_checkpoint
from minllama.evaluation.classification import forward_inputs
from minllama.methods.classify import load
from minllama.methods.saved import read_classifier
from minllama.methods.settings import FinetuneSettings
from minllama.text.labelled import read_labelled

FOLDER = Path(__file__).parent / "fixtures" / "version_0_1"
LOG_PROBS = json.loads((FOLDER / "log_probs.json").read_text())
PRETRAIN = ["--option", "pretrain", "--text", "text.txt", "--vocab_size", "300", "--dim", "8"]
PRETRAIN += ["--n_layers", "2", "--n_heads", "2", "--n_kv_heads", "1", "--max_seq_len", "32"]
PRETRAIN += ["--batch_size", "4", "--steps", "60", "--eval_every", "20", "--dropout", "0.1"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy, made the working folder."""
    shutil.copytree(FOLDER, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


@pytest.mark.parametrize("name", LOG_PROBS)
def test_what_fine_tuning_saved_predicts_the_same(folder, run_cli, name):
    values = {"option": "finetune", "load": name}
    classifier = load(FinetuneSettings.from_flags(values).resolved(), read_classifier(name))
    (inputs,) = classifier.inputs(read_labelled("toy-dev.txt"))
    (batch,) = classifier.loader(inputs, batch_size=12)
    with torch.inference_mode():
        log_probs = classifier.model.eval()(*forward_inputs(batch, torch.device("cpu")))
    expected = LOG_PROBS[name]
    assert set(batch.sents) == set(expected)
    for sentence, row in zip(batch.sents, log_probs, strict=True):
        torch.testing.assert_close(row, torch.tensor(expected[sentence]), atol=1e-4, rtol=1e-4)

    code, _, err = run_cli("--option", "finetune", "--load", name)
    assert code == 0, err
    (output,) = folder.glob("toy-dev-*-output.txt")
    for line in output.read_text().splitlines():
        label, sentence = line.split(" ||| ")
        scores = expected[sentence]
        assert int(label) == scores.index(max(scores))


def test_a_pretraining_run_resumes_to_the_same_weights(folder, run_cli):
    code, out, err = run_cli(*PRETRAIN, "--output_dir", "run")
    assert code == 0, err
    assert "continuing from step 40 in run" in out
    ours, theirs = (read_checkpoint(path)["model"] for path in ("run/model.pt", "whole.pt"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-4, rtol=1e-3)
    before = read_checkpoint(FOLDER / "run/model.pt")["model"]  # ten tolerances away
    assert any((before[name] - tensor).abs().max() > 0.001 for name, tensor in theirs.items())
