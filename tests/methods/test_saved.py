"""Saved classifiers: they predict the same, and nothing else is loaded as one."""

import re
from pathlib import Path

import pytest
import torch
from conftest import assert_refused, make_llama, save_llama

import run_llama
from minllama.checkpoints.pt import read_checkpoint

LOAD = ["--option", "finetune", "--load"]
OUTPUTS = ["toy-dev-advanced-output.txt", "toy-test-advanced-output.txt"]


@pytest.fixture
def saved_run(copy_finetuned):
    """The file that a run with LoRA saved, in a working folder with its data."""
    return copy_finetuned("--tune", "lora", "--max_sentence_len", "9")


def edit(path: str, **parts) -> None:
    """Replace parts of a saved file."""
    torch.save(read_checkpoint(path) | parts, path)


@pytest.mark.parametrize(
    "flags",
    [
        ["--tune", "lora", "--lora_rank", "2", "--lora_alpha", "4", "--lora_dropout", "0.1"],
        ["--tune", "adapter", "--adapter_size", "3", "--causal"],
        ["--tune", "prefix", "--prefix_length", "3"],
        ["--tune", "norm", "--wise_ft", "0", "0.5", "1"],
        ["--tune", "head", "--pooling", "mean", "--causal"],
        ["--prompt_based", "--shots", "2", "--prompt_template", "{sentence} So it is"],
        ["--prompt_based", "--tune", "lora", "--smart", "1", "--smart_steps", "2", "--causal"],
        ["--mixout", "0.5", "--smart", "1", "--wise_ft", "0.5", "1", "--activation_checkpointing"],
        ["--lr_schedule", "cosine", "--warmup", "0.5", "--layer_decay", "0.7", "--pooling", "last"],
    ],
)
def test_what_a_method_saved_loads_and_predicts_the_same(copy_finetuned, run_cli, flags):
    name = copy_finetuned("--lr", "1e-3", *flags)
    out = Path("printed.txt").read_text()
    assert re.search(r"train [\d,]+ of [\d,]+ parameters", out) and "peak memory" in out
    written = [Path(output).read_text() for output in OUTPUTS]
    for output in OUTPUTS:
        Path(output).unlink()
    code, again, err = run_cli(*LOAD, name)
    assert code == 0, err
    assert "train loss" not in again and "save the model" not in again
    assert [Path(output).read_text() for output in OUTPUTS] == written
    assert out[out.index("dev acc ::", out.index("load model")) :].strip() in again


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--max_sentence_len", "8"], "max_sentence_len 9"),
        (["--causal"], "causal False"),
        (["--tune", "adapter"], "tune lora"),
        (["--lora_rank", "4"], "lora_rank 8"),
        (["--grad_accum", "2"], "--grad_accum"),
        (["--label-names", "two.json"], "two.json"),
        (["--pretrained-model-path", "other.pt"], "other.pt"),
        (["--dev", "more-labels.txt"], "more-labels.txt"),
    ],
)
def test_a_saved_run_takes_no_other_settings(saved_run, run_cli, flags, named):
    save_llama(make_llama(seed=1), Path("other.pt"))
    Path("more-labels.txt").write_text("7 ||| a film\n")
    Path("two.json").write_text('["bad", "good"]')
    assert_refused(run_cli(*LOAD, saved_run, *flags), named)


def test_a_saved_run_takes_its_own_settings_and_other_data(saved_run, run_cli):
    same = ["--max_sentence_len", "9", "--tune", "lora", "--no-causal", "--batch_size", "3"]
    Path("other-dev.txt").write_text("1 ||| a film\n")
    code, out, err = run_cli(*LOAD, saved_run, *same, "--dev", "other-dev.txt")
    assert (code, err) == (0, "") and "load 1 data from other-dev.txt" in out


def test_a_saved_run_is_evaluated_as_it_was_trained(project, run_cli):
    flags = ["--option", "finetune", *project.flags, "--causal", "--dtype", "bfloat16"]
    assert run_cli(*flags, "--batch_size", "3", "--max_sentence_len", "7")[0] == 0
    values = {"option": "finetune", "load": "finetune-1-2e-05.pt"}
    settings = run_llama.FinetuneSettings.from_flags(values)
    assert (settings.dtype, settings.batch_size, settings.max_sentence_len) == ("bfloat16", 3, 7)
    assert settings.dev == "data/toy-dev.txt" and settings.causal is True


def test_examples_that_a_saved_run_truncates_are_counted(saved_run, run_cli):
    Path("long-dev.txt").write_text("1 ||| " + "a film " * 200 + "\n")
    edit(saved_run, args=read_checkpoint(saved_run)["args"] | {"max_sentence_len": None})
    code, _, err = run_cli(*LOAD, saved_run, "--dev", "long-dev.txt")
    assert code == 0 and "1 of 7 sentences do not fit the context" in err


def test_a_saved_run_from_own_weights_keeps_its_advanced_names(project, run_cli):
    names = ["--dev_out", "x-dev-advanced-output.txt", "--test_out", "x-test-advanced-output.txt"]
    assert run_cli("--option", "finetune", *project.flags, *names)[0] == 0
    assert run_cli(*LOAD, "finetune-1-2e-05.pt", *names)[0] == 0


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("model_config", "num_labels", "3"),
        ("model_config", "num_labels", 0),
        ("model_config", "hidden_dropout_prob", None),
        ("model_config", "causal", 3),
        ("model_config", "lora_rank", "8"),
        ("model_config", "num_labels", 2**31),
        ("model_config", "hidden_dropout_prob", 7.0),
        ("model_config", "option", "x"),
        ("model_config", "mixout", torch.ones(2)),
        ("model_config", "label_names", ["a"]),
        ("args", "dev", 5),
        ("args", "batch_size", "4"),
        ("model", "classifier_head.bias", torch.tensor([0, torch.nan, 0])),
        ("model", "classifier_head.bias", torch.zeros(3, dtype=torch.int32)),
        ("model", "classifier_head.bias", torch.zeros(3, dtype=torch.complex64)),
        ("model", "classifier_head.bias", torch.zeros(3).to(torch.float8_e5m2)),
        ("model", "classifier_head.bias", torch.full((3,), 1e300, dtype=torch.float64)),
        ("model", "classifier_head.bias", 3),
        ("model", 5, torch.ones(1)),
        *((part, None, x) for part in ("model", "args", "model_config") for x in ({}, [1], None)),
    ],
)
def test_a_wrong_value_in_a_saved_run_is_one_line(saved_run, run_cli, part, name, value):
    """No name stands for the whole part."""
    edit(saved_run, **{part: read_checkpoint(saved_run)[part] | {name: value} if name else value})
    assert_refused(run_cli(*LOAD, saved_run))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_saved_run_of_another_precision_loads(saved_run, run_cli, dtype):
    model = read_checkpoint(saved_run)["model"]
    edit(saved_run, model={name: tensor.to(dtype) for name, tensor in model.items()})
    code, _, err = run_cli(*LOAD, saved_run)
    assert code == 0, err
