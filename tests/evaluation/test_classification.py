"""Accuracy, F1, confusion matrix and the files of predictions and metrics."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from minllama.common.errors import InputError
from minllama.evaluation.classification import Evaluation, model_eval, report_results
from minllama.evaluation.metrics import append_metrics, check_metrics_file, read_metrics
from minllama.text.batches import Example, make_loader

CPU = torch.device("cpu")


class FirstToken(nn.Module):
    """Predicts a sentence's label to be the number of its first token."""

    def forward(self, ids, lengths=None):
        return nn.functional.one_hot(ids[:, 0], 3).float()


class Diverged(nn.Module):
    def forward(self, ids, lengths=None):
        return torch.full((len(ids), 3), float("nan"))


@pytest.mark.parametrize("causal", [False, True])
def test_results_are_in_the_order_of_the_data(causal):
    predicted, labels = [0, 1, 2, 0, 1, 1, 0], [0, 1, 1, 0, 2, 1, 1]
    examples = [
        Example(f"s{i}", label, [prediction] + [0] * (i * 3 % 5))
        for i, (label, prediction) in enumerate(zip(labels, predicted, strict=True))
    ]
    loader = make_loader(examples, 2, 0, causal=causal)
    result = model_eval(loader, FirstToken(), CPU)
    assert result.predictions == predicted and result.labels == labels
    assert result.sentences == [f"s{i}" for i in range(7)]
    assert result.accuracy == pytest.approx(4 / 7)
    # F1 is 2 TP / (2 TP + FP + FN): 4 / 5 for label 0, 4 / 7 for label 1, 0 for label 2.
    assert result.macro_f1 == pytest.approx((4 / 5 + 4 / 7 + 0) / 3)


def test_scores_that_are_not_finite_are_refused():
    loader = make_loader([Example("s", 0, [1])], 2, 0, causal=False)
    with pytest.raises(InputError, match="not finite"):
        model_eval(loader, Diverged(), CPU)


def test_predictions_and_metrics_are_written_and_the_report_is_printed(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    settings = SimpleNamespace(
        option="prompt", dev_out="d.txt", test_out="t.txt", report=True, metrics_out="m.jsonl"
    )
    results = {
        "dev": Evaluation(0.75, 0.7, [0, 1, 1, 1], [0, 1, 0, 1], list("abcd")),
        "test": Evaluation(1.0, 1.0, [1], [1], ["e"]),
    }
    records = report_results(settings, dict(zip(results, results, strict=True)), results.get, CPU,
                             ["bad", "good"])  # fmt: skip
    assert Path("d.txt").read_text() == "0 ||| a\n1 ||| b\n1 ||| c\n1 ||| d\n"
    assert Path("t.txt").read_text() == "1 ||| e\n"
    assert read_metrics("m.jsonl") == records == json.loads(json.dumps(records))
    assert records[0]["confusion_matrix"] == [[1, 1], [0, 2]]
    output = capsys.readouterr().out
    assert output.startswith("dev acc :: 0.750\ntest acc :: 1.000\n")
    assert " bad      1      1\ngood      0      2\n" in output
    assert "dev acc :: 0.750, majority-class baseline (bad) :: 0.500" in output


def test_metrics_are_appended_to_metrics_only(tmp_path):
    path = tmp_path / "m.jsonl"
    check_metrics_file(path)
    append_metrics(path, a=1)
    check_metrics_file(path)
    append_metrics(path, a=2)
    assert path.read_text() == '{"a": 1}\n{"a": 2}\n'
    for content in ('{"a": 1}', "[1]\n", "text\n"):
        path.write_text(content)
        with pytest.raises(InputError, match="not a file of JSON lines"):
            check_metrics_file(path)
    with pytest.warns(UserWarning, match="a line of metrics is lost"):
        append_metrics(tmp_path, a=1)
