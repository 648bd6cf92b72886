"""The benchmarks compare the same work: the reference's way has the results of `run_llama.py`."""

import json
from pathlib import Path

import pytest

from benchmarks import reference_way


@pytest.mark.parametrize("option", ["finetune", "prompt"])
def test_it_has_the_results_of_the_command_line(project, run_cli, monkeypatch, option):
    flags = ["--option", option, "--lr", "1e-2"] if option == "finetune" else ["--option", option]
    data = [flag for flag in project.flags if flag not in ("--epochs", "1")]
    tokenizer = ["--tokenizer-path", "tokenizer.model"]
    monkeypatch.setattr("sys.argv", ["reference_way", *data, *tokenizer, *flags])
    reference_way.main()
    assert run_cli(*project.flags, *flags, "--metrics_out", "ours.jsonl")[0] == 0
    reference, ours = (
        [json.loads(line) for line in Path(name).read_text().splitlines()]
        for name in ("metrics.jsonl", "ours.jsonl")
    )
    assert [e["accuracy"] for e in reference[-2:]] == [e["accuracy"] for e in ours[-2:]]
    losses = [[epoch["train_loss"] for epoch in records[:-2]] for records in (reference, ours)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
