"""Files of older versions still load, and mean what they meant."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import assert_refused

from minllama.checkpoints.pt import read_checkpoint
from minllama.evaluation.classification import forward_inputs
from minllama.methods.classify import load
from minllama.methods.settings import FinetuneSettings
from minllama.text.labelled import read_labelled

FIXTURES = Path(__file__).parent / "fixtures"
LOG_PROBS = json.loads((FIXTURES / "version_0_1/log_probs.json").read_text())
PRETRAIN = ["--option", "pretrain", "--text", "text.txt", "--vocab_size", "300", "--dim", "8"]
PRETRAIN += ["--n_layers", "2", "--n_heads", "2", "--n_kv_heads", "1", "--max_seq_len", "32"]
PRETRAIN += ["--batch_size", "4"]
FINETUNE = ["--option", "finetune", "--batch_size", "4", "--epochs", "3", "--lr", "0.02"]
FINETUNE += ["--smart", "0.1", "--pooling", "mean", "--lr_schedule", "linear", "--warmup", "0.2"]
FINETUNE += ["--pretrained-model-path", "model.pt", "--train", "toy-train.txt", "--causal"]
FINETUNE += ["--dev", "toy-dev.txt", "--test", "toy-test.txt"]
FINETUNE += ["--label-names", "toy-label-mapping.json"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with copies of all files."""
    for version in ("version_0_1", "version_0_2"):
        shutil.copytree(FIXTURES / version, tmp_path / "old", dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def assert_same_weights(ours, theirs, before) -> None:
    """Compare two files, up to the rounding of other processors; `before` is far from both."""
    ours, theirs, before = (read_checkpoint(path)["model"] for path in (ours, theirs, before))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-4, rtol=1e-3)
    assert any((before[name] - tensor).abs().max() > 0.001 for name, tensor in theirs.items())


@pytest.mark.parametrize("name", LOG_PROBS)
def test_what_fine_tuning_saved_predicts_the_same(folder, run_cli, name):
    values = {"option": "finetune", "load": name}
    classifier = load(FinetuneSettings.from_flags(values).resolved(), name)
    (inputs,) = classifier.tokenize(read_labelled("toy-dev.txt"))
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


@pytest.mark.parametrize(
    ("run", "whole", "step", "flags"),
    [
        ("run", "whole", 40, ["--steps", "60", "--eval_every", "20", "--dropout", "0.1"]),
        ("pretrained", "whole-pretrained", 20, ["--dropout", "0.1"]),
        ("pretrained-in-two", "whole-pretrained-in-two", 20, []),
    ],
)
def test_pretraining_resumes_to_the_same_weights(folder, run_cli, run, whole, step, flags):
    flags = [*PRETRAIN, "--steps", "40", "--eval_every", "10", *flags]
    code, out, err = run_cli(*flags, "--output_dir", run)
    assert code == 0, err
    assert f"step {step}/" not in out
    (before,) = FIXTURES.glob(f"*/{run}/model.pt")
    assert_same_weights(f"{run}/model.pt", f"{whole}.pt", before)
    assert [path.name for path in Path(run).glob("state*")] == ["state.pt"]


def test_finetuning_resumes_to_the_same_weights_and_is_finished(folder, run_cli):
    (weights,) = (path.name for path in folder.glob("finetune-3-0.02-pooling*.pt"))
    code, out, err = run_cli(*FINETUNE)
    assert code == 0, err
    assert "epoch 0:" not in out and "epoch 1:" in out
    assert_same_weights(weights, "whole-finetune.pt", FIXTURES / "version_0_2" / weights)
    assert not list(folder.glob("*.state"))
    for finished in (weights, "whole-finetune.pt"):  # of this version, and of that one
        shutil.copy(finished, "copy.pt")
        shutil.move("copy.pt", weights)
        code, again, err = run_cli(*FINETUNE)
        assert code == 0 and "train loss" not in again and "--fresh" in err
        assert again.splitlines()[-2:] == out.splitlines()[-2:]


def test_weights_that_stayed_in_bfloat16_predict_the_same(folder, run_cli):
    (weights,) = folder.glob("f*-6-*")
    code, _, err = run_cli("--option", "finetune", "--load", weights.name)
    assert code == 0, err
    output = Path("toy-dev-advanced-output.txt").read_text()
    assert output == Path("predictions-dev.txt").read_text()


@pytest.mark.parametrize("file", ["values.json", ".metadata", "__1_0.distcp"])
def test_a_damaged_state_is_one_line(folder, run_cli, file):
    path = Path("pretrained-in-two/state-20", file)
    path.write_bytes(path.read_bytes()[:100])
    flags = [*PRETRAIN, "--steps", "40", "--eval_every", "10", "--output_dir", "pretrained-in-two"]
    assert_refused(run_cli(*flags), "state-20")


def test_the_index_of_a_state_runs_no_code(folder, run_cli):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, ("made",)

    Path("pretrained-in-two/state-20/.metadata").write_bytes(pickle.dumps(Hostile()))
    flags = [*PRETRAIN, "--steps", "40", "--eval_every", "10", "--output_dir", "pretrained-in-two"]
    assert_refused(run_cli(*flags))
    assert not Path("made").exists()
