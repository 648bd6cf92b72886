"""Fine-tuning loses nothing: whose file it is, resuming, and what a finished run does."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SENTENCES, assert_refused, interrupted_at
from filelock import FileLock

from minllama.checkpoints.pt import read_checkpoint
from minllama.methods.classify import Classifier

FLAGS = ["--option", "finetune", "--lr", "1e-2"]
WEIGHTS = "finetune-2-0.01.pt"


@pytest.fixture
def flags(project) -> list[str]:
    """A run of two epochs of six steps, and other data beside its own."""
    for split, n in (("train", 21), ("dev", 9), ("test", 5)):
        lines = [f"{i % 3} ||| {SENTENCES[i % 6][: 12 + i]} .\n" for i in range(n)]
        Path(f"data/toy-{split}.txt").write_text("".join(lines))
        Path(f"data/other-{split}.txt").write_text("".join(lines[::-1]))
    return [*FLAGS, *project.flags, "--epochs", "2"]


def assert_same(path: str, other: str) -> None:
    """Check that two files have the same weights, moments and state of the random generator."""
    saved = [read_checkpoint(path), read_checkpoint(other)]
    a, b = ([x["model"], x["optim"]["state"], x["torch_rng"]] for x in saved)
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def files() -> set[str]:
    return {path.name for path in Path().iterdir()} - {"data", "model.pt", "tokenizer.model"}


def interrupt(run_cli, flags: list[str], step: int) -> Path:
    """Interrupt a run before a step; returns the folder of its state."""
    with interrupted_at(step):
        assert run_cli(*flags, "--save_every", "2")[0] == 130
    (folder,) = Path().glob("*.state")
    return folder


def test_another_runs_weights_are_left_alone(flags, run_cli):
    """Other data, another seed, and a file of which nobody knows whose it is."""
    code, out, err = run_cli(*flags)
    assert (code, err) == (0, "") and f"save the model to {WEIGHTS}" in out
    outputs = {f"toy-{split}-finetuning-output.txt" for split in ("dev", "test")}
    assert files() == {WEIGHTS, *outputs}
    first = Path(WEIGHTS).read_bytes()
    other_data = [
        flag.replace("data/toy-t", "data/other-t").replace("toy-dev", "other-dev") for flag in flags
    ]
    names = set()
    for other in (other_data, [*flags, "--seed", "5"]):
        code, out, err = run_cli(*other)
        assert code == 0
        (name,) = re.findall(r"finetune-2-0\.01-(?:toy|other)-[0-9a-f]{8}\.pt", err)
        assert f"load model from {name}" in out
        names.add(name)
        again = run_cli(*other)[1]
        assert f"load model from {name}" in again and "epoch 0" not in again  # it is finished
    assert len(names) == 2 and Path(WEIGHTS).read_bytes() == first
    Path(WEIGHTS).write_bytes(b"mine")
    assert run_cli(*flags, "--seed", "6")[0] == 0
    assert Path(WEIGHTS).read_bytes() == b"mine"


def test_runs_at_once_keep_apart_and_one_run_is_not_run_twice(flags, run_cli):
    with FileLock(f".{WEIGHTS}.lock"):  # as another run holds it, before its first epoch ends
        assert run_cli(*flags)[0] == 0 and not Path(WEIGHTS).exists()
    (name,) = (path.name for path in Path().glob("finetune-*.pt"))
    digest = name.removesuffix(".pt")[-8:]
    with FileLock(f".finetune-{digest}.lock"):
        assert_refused(run_cli(*flags), WEIGHTS)


@pytest.mark.parametrize(
    ("method", "second_stop"),
    [
        (["--hidden_dropout_prob", "0.3"], 7),
        (["--causal", "--grad_accum", "2"], 3),  # three steps per epoch
        (["--tune", "lora", "--lora_dropout", "0.1"], 7),
        (["--tune", "prefix", "--skip_train_eval"], 7),
        (["--smart", "1"], 7),
        (["--mixout", "0.3"], 7),
        (["--lr_schedule", "linear", "--warmup", "0.2", "--layer_decay", "0.8"], 7),
        (["--wise_ft", "0.5", "1"], 7),
        (["--causal", "--prompt_based"], 7),
        (["--shots", "4", "--patience", "1"], 3),  # three steps per epoch
    ],
)
def test_an_interrupted_run_ends_with_the_same_weights(flags, run_cli, method, second_stop):
    """Stopped in the first epoch and in the second."""
    flags = [*flags, *method]
    code, whole, err = run_cli(*flags)
    assert code == 0, err
    (weights,) = Path().glob("finetune-*.pt")
    outputs = sorted(name for name in files() if name.endswith("output.txt"))
    Path("whole").mkdir()
    for name in (weights.name, *outputs):
        Path(name).rename(Path("whole", name))
    interrupt(run_cli, flags, 3)
    assert not weights.exists()
    interrupt(run_cli, flags, second_stop)
    code, out, err = run_cli(*flags)
    assert code == 0 and "epoch 0" not in out
    assert out.splitlines()[-2:] == whole.splitlines()[-2:]
    assert_same(weights.name, f"whole/{weights.name}")
    for name in outputs:
        assert Path(name).read_bytes() == Path("whole", name).read_bytes()
    assert files() == {weights.name, *outputs, "whole"}


def test_an_epoch_interrupted_after_its_last_step_is_resumed(flags, run_cli, monkeypatch):
    """Its last step has fewer batches than the others: four and two."""
    flags = [*flags, "--grad_accum", "4"]
    assert run_cli(*flags)[0] == 0
    Path(WEIGHTS).rename("whole.pt")
    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "evaluate", interrupted)
        assert run_cli(*flags, "--save_every", "1")[0] == 130
    code, _, err = run_cli(*flags)
    assert code == 0 and "resuming from epoch 0, step 2" in err
    assert_same(WEIGHTS, "whole.pt")


def interrupted(*_args):
    raise KeyboardInterrupt


def test_a_line_of_metrics_that_a_kill_prevented_is_written_on_resuming(flags, run_cli):
    flags = [*flags, "--metrics_out", "metrics.jsonl"]
    interrupt(run_cli, flags, 9)  # in the second epoch
    (line,) = Path("metrics.jsonl").read_text().splitlines()
    for left in ("", f"{line}\n"):
        Path("metrics.jsonl").write_text(left)
        interrupt(run_cli, flags, 2)
        assert Path("metrics.jsonl").read_text() == f"{line}\n"


def test_a_run_whose_best_weights_are_gone_is_refused_before_it_trains(flags, run_cli):
    interrupt(run_cli, flags, 9)  # in the second epoch
    Path(WEIGHTS).unlink()
    with interrupted_at(1):
        assert_refused(run_cli(*flags), WEIGHTS, "--fresh trains again")
    assert run_cli(*flags, "--fresh")[0] == 0


def test_a_state_holds_no_frozen_weights(flags, run_cli):
    saved = read_checkpoint(interrupt(run_cli, [*flags, "--tune", "lora"], 3) / "state.pt")
    assert saved["model"] and all("lora_" in name or "head" in name for name in saved["model"])


STATE_EDITS = {
    "losses": [["x"], [[1, 2]], [10**30], [0.5] * 1000],
    "records": ["x"],
    "epoch": [-1, 10**9, 0.5],
    "at_start.cpu": [None, torch.zeros(3)],
    "now.cpu": [torch.zeros(torch.get_rng_state().shape, dtype=torch.uint8)],
    "run": [{}, torch.ones(0)],
    "step": [-3],
    "optimizer": [5],
}


def test_an_edited_state_is_one_line(flags, run_cli):
    folder = interrupt(run_cli, flags, 3)
    saved = read_checkpoint(folder / "state.pt")
    edits = [(key, value) for key, values in STATE_EDITS.items() for value in values]
    step = {i: {**values, "step": -3} for i, values in saved["optimizer"]["state"].items()}
    edits.append(("optimizer", {**saved["optimizer"], "state": step}))
    for key, value in edits:
        torch.save(saved | {key: value}, folder / "state.pt")
        assert_refused(run_cli(*flags), folder.name)


def test_a_finished_run_is_evaluated_and_not_trained_again(flags, run_cli):
    flags = [*flags, "--metrics_out", "metrics.jsonl"]
    code, first, err = run_cli(*flags)
    assert (code, err) == (0, "")
    weights, lines = Path(WEIGHTS).read_bytes(), Path("metrics.jsonl").read_text().splitlines()
    output = Path("toy-dev-finetuning-output.txt")
    predictions = output.read_bytes()
    output.unlink()
    code, again, err = run_cli(*flags)
    assert code == 0 and err.count("\n") == 1 and "--fresh" in err
    assert "train loss" not in again
    assert again.splitlines()[-2:] == first.splitlines()[-2:]
    assert (Path(WEIGHTS).read_bytes(), output.read_bytes()) == (weights, predictions)
    added = Path("metrics.jsonl").read_text().splitlines()[len(lines) :]
    assert [json.loads(line)["split"] for line in added] == ["dev", "test"]
    code, fresh, err = run_cli(*flags, "--fresh")
    assert (code, err) == (0, "")
    assert fresh.splitlines()[1:] == first.splitlines()[1:]


@pytest.mark.skipif(sys.platform == "win32", reason="kills with a signal")
@pytest.mark.parametrize("n", [25, 60])
def test_a_kill_at_any_file_operation_loses_nothing(flags, run_cli, n):
    """At two of them, of about 80; tests.campaign takes every one."""
    assert run_cli(*flags)[0] == 0
    Path(WEIGHTS).rename("whole.pt")
    whole = files()
    command = [sys.executable, "-m", "tests.file_operations", str(n), str(ROOT / "run_llama.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.run([*command, *flags, "--save_every", "3"], env=environment)
    assert killed.returncode == -9
    assert run_cli(*flags, "--save_every", "3")[0] == 0
    assert_same(WEIGHTS, "whole.pt")
    assert files() == whole | {WEIGHTS}
