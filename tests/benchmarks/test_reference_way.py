"""The benchmarks compare the same work: the reference's way has the results of `run_llama.py`."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import reference_way


@pytest.fixture
def run_reference(project, monkeypatch):
    """Runs the reference's way on the project's data; returns its records."""

    def run(*flags: str) -> list[dict]:
        data = [flag for flag in project.flags if flag not in ("--epochs", "1")]
        tokenizer = ["--tokenizer-path", "tokenizer.model"]
        monkeypatch.setattr("sys.argv", ["reference_way", *data, *tokenizer, *flags])
        reference_way.main()
        return read_records("metrics.jsonl")

    return run


def read_records(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_fine_tuning_has_the_results_of_the_command_line(project, run_cli, run_reference):
    epoch, *evaluations = run_reference("--option", "finetune", "--lr", "1e-2")
    flags = ["--option", "finetune", "--lr", "1e-2", "--metrics_out", "ours.jsonl"]
    assert run_cli(*project.flags, *flags)[0] == 0
    our_epoch, *ours = read_records("ours.jsonl")
    assert epoch["train_loss"] == pytest.approx(our_epoch["train_loss"], rel=1e-4)
    assert [e["accuracy"] for e in evaluations] == [e["accuracy"] for e in ours]


def test_prompting_has_the_results_of_the_command_line(project, run_cli, run_reference):
    evaluations = run_reference("--option", "prompt")
    flags = ["--option", "prompt", "--metrics_out", "ours.jsonl"]
    assert run_cli(*project.flags, *flags)[0] == 0
    ours = read_records("ours.jsonl")
    assert [e["accuracy"] for e in evaluations] == [e["accuracy"] for e in ours]


def test_every_layer_rebuilds_its_rotary_table(project, monkeypatch):
    model = reference_way.ReferenceClassifier("model.pt", 3, None)
    n_tables = 0
    polar = torch.polar

    def count(*args: torch.Tensor) -> torch.Tensor:
        nonlocal n_tables
        n_tables += 1
        return polar(*args)

    monkeypatch.setattr(torch, "polar", count)
    model(torch.tensor([[1, 5, 7]]))
    assert n_tables == 2
