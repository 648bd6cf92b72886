"""What concerns all methods: which go together, their flags and files, saved runs, and the list."""

import ast
import itertools
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, make_llama, save_llama
from methods_kit import (
    is_one_line,
    methods_of,
    predictions,
    saved_file,
    snapshot,
    train,
)
from toy_method import Toy

import minllama.tasks.finetune
from minllama import methods
from minllama.checkpoints.pt import read_checkpoint
from minllama.common.errors import InputError
from minllama.methods.saved import count_parameters, load_trained
from minllama.tasks.finetune import FinetuneSettings
from minllama.text.labelled import read_labelled
from minllama.training.activation_checkpointing import checkpoint_activations
from minllama.training.state import trained_state

pytest_plugins = ["methods_fixtures"]

# Parts of the names of what trains with each --tune, besides a new head.
TRAINED_PARTS = {
    "full": "",
    "head": "classifier_head",
    "lora": "lora_",
    "adapter": "adapter.",
    "prefix": "prefix_",
    "norm": "norm.weight",
}
UNCHANGED_AT_FIRST = ["head", "lora", "adapter", "norm"]
NOTHING_TO_TRAIN = [("head", {"prompt_based": True})]
WITH_CHECKPOINTED_ACTIVATIONS = [{"smart": 1.0, "mixout": 0.4}]
ONE_BY_ONE = [
    {"prompt_based": True},
    {"shots": 2},
    {"tune": "head"},
    {"tune": "lora"},
    {"tune": "adapter"},
    {"tune": "prefix"},
    {"tune": "norm"},
    {"pooling": "mean"},
    {"wise_ft": [0.5]},
    {"mixout": 0.5},
    {"lr_schedule": "linear"},
    {"layer_decay": 0.5},
    {"patience": 1},
    {"smart": 1.0},
]
TWO_BY_TWO = [a | b for a, b in itertools.combinations(ONE_BY_ONE, 2) if a.keys() != b.keys()]
NOT_TOGETHER = [
    ({"prompt_based": True, "tune": "head"}, "--tune head.*--prompt_based.*nothing to train"),
    ({"prompt_based": True, "pooling": "mean"}, "--pooling.*--prompt_based"),
    ({"tune": "lora", "wise_ft": [0.5]}, "--wise_ft.*--tune lora"),
    ({"tune": "adapter", "wise_ft": [0.5]}, "--wise_ft.*--tune adapter"),
    ({"tune": "prefix", "wise_ft": [0.5]}, "--wise_ft.*--tune prefix"),
    ({"tune": "head", "mixout": 0.5}, "--mixout.*--tune head"),
    ({"tune": "lora", "mixout": 0.5}, "--mixout.*--tune lora"),
    ({"tune": "adapter", "mixout": 0.5}, "--mixout.*--tune adapter"),
    ({"tune": "prefix", "mixout": 0.5}, "--mixout.*--tune prefix"),
    ({"tune": "norm", "mixout": 0.5}, "--mixout.*--tune norm"),
    ({"tune": "head", "layer_decay": 0.5}, "--layer_decay"),
]


def test_every_choice_of_tune_is_among_those_tested_here():
    assert set(methods.tune_choices()) == TRAINED_PARTS.keys()


@pytest.mark.parametrize("tune", UNCHANGED_AT_FIRST)
def test_nothing_changes_before_training(make_model, tune):
    assert torch.allclose(predictions(make_model(tune=tune)), predictions(make_model()), atol=1e-6)


@pytest.mark.parametrize("tune", TRAINED_PARTS)
@pytest.mark.parametrize("flags", [{}, {"prompt_based": True}])
def test_frozen_tensors_stay_and_the_others_train(make_model, tune, flags):
    if (tune, flags) in NOTHING_TO_TRAIN:
        with pytest.raises(InputError, match="nothing to train"):
            make_model(tune=tune, **flags)
        return
    model = make_model(tune=tune, **flags)
    before = snapshot(model)
    losses = train(model, 6)
    assert losses[-1] < losses[0]
    n_trained = 0
    for name, parameter in model.named_parameters():
        trains = TRAINED_PARTS[tune] in name or name.startswith("classifier_head")
        assert parameter.requires_grad == trains, name
        assert torch.equal(parameter, before[name]) != trains, name
        n_trained += trains * parameter.numel()
    assert count_parameters(model)[0] == n_trained


@pytest.mark.parametrize("tune", TRAINED_PARTS)
def test_trained_tensors_load_onto_the_base(make_model, tune, tmp_path):
    model = make_model(tune=tune)
    train(model)
    torch.save(trained_state(model), tmp_path / "trained.pt")
    saved = read_checkpoint(tmp_path / "trained.pt")
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names <= saved.keys() and (tune == "full" or saved.keys() == names)
    other = make_model(tune=tune)
    assert not torch.allclose(predictions(other), predictions(model), atol=1e-3)
    load_trained(other, saved, "trained.pt")
    assert torch.equal(predictions(other), predictions(model))
    more = {"extra.weight": torch.zeros(1)}
    less = dict(list(saved.items())[1:])
    reshaped = {name: tensor[None] for name, tensor in saved.items()}
    for wrong in (saved | more, less, reshaped):
        with pytest.raises(InputError, match="not those"):
            load_trained(make_model(tune=tune), wrong, "trained.pt")


@pytest.mark.parametrize("flags", WITH_CHECKPOINTED_ACTIVATIONS)
def test_methods_go_with_checkpointed_activations(make_model, flags):
    results = []
    for checkpointing in (False, True):
        model = make_model(hidden_dropout_prob=0.2)
        if checkpointing:
            checkpoint_activations(model.llama.layers)
        torch.manual_seed(0)
        losses = train(model, **flags)
        results.append((losses, snapshot(model)))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-5)
    for name, tensor in results[0][1].items():
        assert torch.allclose(tensor, results[1][1][name], atol=1e-4), name


def test_every_method_is_among_those_tested_two_by_two():
    on = {type(method) for flags in ONE_BY_ONE for method in methods_of(flags)}
    assert on == set(methods.METHODS)
    assert all(flags in TWO_BY_TWO for flags, _ in NOT_TOGETHER)


@pytest.mark.parametrize("flags", TWO_BY_TWO, ids=lambda flags: " ".join(map(str, flags.values())))
def test_two_methods_train_and_load_together_or_are_refused(make_model, flags):
    for refused, named in NOT_TOGETHER:
        if flags == refused:
            with pytest.raises(InputError, match=named):
                train(make_model(**flags), **flags)
            return
    model = make_model(hidden_dropout_prob=0.1, **flags)
    before = predictions(model)
    assert all(map(math.isfinite, train(model, **flags)))
    assert not torch.allclose(predictions(model), before, atol=1e-3)
    other = make_model(**flags)
    load_trained(other, trained_state(model), "trained.pt")
    for method in methods_of(flags):
        method.merge(other)
    assert torch.allclose(predictions(other), predictions(model), atol=1e-4)


# Saved runs

METHOD_FLAGS = [
    ["--tune", "lora", "--lora_rank", "2", "--lora_alpha", "4", "--lora_dropout", "0.1"],
    ["--tune", "adapter", "--adapter_size", "3"],
    ["--tune", "prefix", "--prefix_length", "3"],
    ["--tune", "norm", "--wise_ft", "0", "0.5", "1"],
    ["--tune", "head", "--pooling", "mean"],
    ["--prompt_based", "--shots", "2", "--prompt_template", "{sentence} So it is"],
    ["--prompt_based", "--tune", "lora", "--smart", "1", "--smart_steps", "2"],
    ["--mixout", "0.5", "--smart", "1", "--wise_ft", "0.5", "1", "--activation_checkpointing"],
    ["--lr_schedule", "cosine", "--warmup", "0.5", "--layer_decay", "0.7", "--pooling", "last"],
]
OUTPUTS = ["toy-dev-advanced-output.txt", "toy-test-advanced-output.txt"]


@pytest.mark.parametrize("causal", ["--causal", "--no-causal"])
@pytest.mark.parametrize("flags", METHOD_FLAGS)
def test_what_a_method_saved_loads_and_predicts_the_same(project, run_cli, flags, causal):
    flags = [*project.flags, "--option", "finetune", causal, "--lr", "1e-3", *flags]
    code, out, err = run_cli(*flags)
    assert code == 0, err
    assert re.search(r"train [\d,]+ of [\d,]+ parameters", out) and "peak memory" in out
    outputs = [project.path / name for name in OUTPUTS]
    written = [path.read_text() for path in outputs]
    for path in outputs:
        path.unlink()
    load = ["--load", saved_file(project), "--dev_out", OUTPUTS[0], "--test_out", OUTPUTS[1]]
    code, again, _ = run_cli("--option", "finetune", *project.flags, *load)
    assert code == 0
    assert "train loss" not in again and "save the model" not in again
    assert [path.read_text() for path in outputs] == written
    assert out[out.index("dev acc ::", out.index("load model")) :].strip() in again


SAVED_RUN = ["--tune", "lora"]
OTHER_SETTINGS = [
    (["--max_sentence_len", "8"], "trained with max_sentence_len 9"),
    (["--causal"], "trained with causal False"),
    (["--tune", "adapter"], "trained with tune lora"),
    (["--lora_rank", "4"], "trained with lora_rank 8"),
    (["--grad_accum", "2"], "--grad_accum"),
    (["--label-names", "two.json"], "two.json"),
    (["--pretrained-model-path", "other.pt"], "trained on other weights than other.pt"),
    (["--dev", "more-labels.txt"], "more-labels.txt"),
]


@pytest.fixture
def saved_run(project, run_cli):
    """A trained classifier, and the flags that load it."""
    flags = ["--option", "finetune", *project.flags]
    assert run_cli(*flags, *SAVED_RUN, "--max_sentence_len", "9")[0] == 0
    return ["--option", "finetune", "--load", saved_file(project)]


@pytest.mark.parametrize(("flags", "named"), OTHER_SETTINGS)
def test_a_saved_run_takes_no_other_settings(project, run_cli, saved_run, flags, named):
    save_llama(make_llama(seed=1), project.path / "other.pt")
    (project.path / "more-labels.txt").write_text("7 ||| a film\n")
    (project.path / "two.json").write_text('["bad", "good"]')
    code, _, err = run_cli(*saved_run, *flags)
    assert code == 2
    assert is_one_line(err) and named in err
    same = ["--max_sentence_len", "9", *SAVED_RUN, "--no-causal"]
    assert run_cli(*saved_run, *same)[0] == 0


def test_a_saved_run_reports_under_the_labels_names(project, run_cli):
    flags = [flag for flag in project.flags if "label" not in flag]  # the names are not needed
    assert run_cli("--option", "finetune", *flags)[0] == 0
    load = ["--option", "finetune", "--load", saved_file(project), "--report"]
    assert "fair" in run_cli(*load)[1]  # they lie beside the data
    mapping = (project.path / "data/toy-label-mapping.json").rename(project.path / "names.json")
    code, out, err = run_cli(*load, "--label-names", str(mapping))
    assert code == 0, err
    assert "fair" in out and "fair" not in run_cli(*load)[1]


NOT_IN_OLDER_FILES = (["--pooling", "mean"], "trained with pooling None")


def test_flags_that_an_older_saved_run_does_not_know_are_off(project, run_cli):
    assert run_cli("--option", "finetune", *project.flags)[0] == 0
    path = project.path / saved_file(project)
    saved = read_checkpoint(path)
    assert methods.values_of(()).keys() <= saved["args"].keys() & saved["model_config"].keys()
    for part in ("args", "model_config"):
        saved[part] = {n: v for n, v in saved[part].items() if n not in methods.values_of(())}
    torch.save(saved, path)
    load = ["--option", "finetune", "--load", path.name]
    assert run_cli(*load)[0] == 0
    flags, named = NOT_IN_OLDER_FILES
    code, _, err = run_cli(*load, *flags)
    assert code == 2 and named in err


def test_a_saved_run_is_evaluated_as_it_was_trained(project, run_cli, monkeypatch):
    flags = ["--option", "finetune", *project.flags, "--causal", "--dtype", "bfloat16"]
    assert run_cli(*flags, "--batch_size", "3", "--max_sentence_len", "7")[0] == 0
    seen = []
    monkeypatch.setattr(
        minllama.tasks.finetune, "report_results", lambda args, *_: seen.append(args)
    )
    assert run_cli("--option", "finetune", "--load", saved_file(project))[0] == 0
    (args,) = seen
    assert (args.dtype, args.batch_size, args.max_sentence_len) == ("bfloat16", 3, 7)
    assert args.dev == "data/toy-dev.txt" and args.causal is True


def test_rows_that_a_saved_run_cuts_are_counted(project, run_cli, saved_run):
    (project.path / "long-dev.txt").write_text("1 ||| " + "a film " * 200 + "\n")
    path = project.path / saved_run[-1]
    saved = read_checkpoint(path)
    saved["args"]["max_sentence_len"] = None
    torch.save(saved, path)
    code, _, err = run_cli(*saved_run, "--dev", "long-dev.txt")
    assert code == 0 and "1 of 7 sentences do not fit the context" in err


def test_a_saved_run_from_own_weights_keeps_its_advanced_names(project, run_cli):
    names = ["--dev_out", "x-dev-advanced-output.txt", "--test_out", "x-test-advanced-output.txt"]
    assert run_cli("--option", "finetune", *project.flags, *names)[0] == 0
    assert run_cli("--option", "finetune", "--load", saved_file(project), *names)[0] == 0


def test_a_saved_run_with_values_that_are_no_numbers_is_named(project, run_cli, saved_run):
    path = project.path / saved_run[-1]
    saved = read_checkpoint(path)
    saved["model"]["classifier_head.bias"][0] = float("nan")
    torch.save(saved, path)
    code, _, err = run_cli(*saved_run)
    assert code == 2 and "classifier_head.bias has values that are not finite" in err


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("model_config", "num_labels", "3"),
        ("model_config", "num_labels", 0),
        ("model_config", "hidden_dropout_prob", None),
        ("model_config", "causal", 3),
        ("model_config", "lora_rank", "8"),
        ("args", "dev", 5),
        ("args", "batch_size", "4"),
    ],
)
def test_a_setting_of_another_type_is_one_line(project, run_cli, saved_run, part, name, value):
    path = project.path / saved_run[-1]
    saved = read_checkpoint(path)
    torch.save(saved | {part: saved[part] | {name: value}}, path)
    code, _, err = run_cli(*saved_run)
    assert code == 2 and "not what --option finetune saves" in err and err.count("\n") == 1


@pytest.mark.parametrize("part", ["model", "args", "model_config"])
def test_a_malformed_saved_run_is_one_line(project, run_cli, saved_run, part):
    path = project.path / saved_run[-1]
    saved = read_checkpoint(path)
    for broken in ({}, [1], None):
        torch.save(saved | {part: broken}, path)
        code, _, err = run_cli(*saved_run)
        assert code == 2 and is_one_line(err), (broken, err)


# Flags that are refused

BAD_METHODS = [
    (["--mixout", "0.5", "--tune", "lora"], "--mixout"),
    (["--mixout", "1"], "--mixout"),
    (["--wise_ft", "0.5", "--tune", "prefix"], "--wise_ft"),
    (["--wise_ft", "1.5"], "--wise_ft"),
    (["--layer_decay", "0.5", "--tune", "head"], "--layer_decay"),
    (["--tune", "head", "--prompt_based"], "nothing to train"),
    (["--tune", "lora", "--lora_rank", "33"], "--lora_rank"),
    (["--tune", "adapter", "--adapter_size", "33"], "--adapter_size"),
    (["--shots", "5"], "label 0 has 4 sentences"),
    (["--prompt_based", "--prompt_template", "no place"], "--prompt_template"),
    (["--prompt_based", "--label-names", "absent.json"], "absent.json"),
    (["--wise_ft", "0.5", "--label-names", "absent.json"], "absent.json"),
    (["--tune", "prefix", "--prefix_length", "128"], "--prefix_length"),
    (["--load", "absent.pt"], "absent.pt"),
    (["--load", "model.pt"], "not what --option finetune saves"),
    (["--prompt_based", "--causal", "--activation_checkpointing"], "--activation_checkpointing"),
    (["--prompt_based", "--pooling", "mean"], "--pooling"),
]
IDLE_FLAGS = [
    (["--lora_rank", "4"], "--lora_rank acts only with --tune lora"),
    (["--tune", "lora", "--adapter_size", "4"], "--adapter_size acts only with --tune adapter"),
    (["--prefix_length", "4"], "--prefix_length acts only with --tune prefix"),
    (["--smart_mu", "1"], "--smart_mu acts only with --smart"),
    (
        ["--prompt_template", "{sentence}"],
        "acts only with --option prompt or predict or --prompt_based",
    ),
    (["--option", "prompt", "--mixout", "0.5"], "--mixout acts only with --option finetune"),
    (["--option", "prompt", "--load", "x.pt"], "--load acts only with --option finetune"),
    (["--option", "generate", "--tune", "lora"], "--tune acts only with --option finetune"),
    (["--option", "generate", "--report"], "--report acts only with --option prompt or finetune"),
    (["--option", "pretrain", "--pooling", "mean"], "--pooling acts only with --option finetune"),
    (["--dropout", "0.1"], "--dropout acts only with --option pretrain"),
]


@pytest.mark.parametrize(("flags", "named"), BAD_METHODS + IDLE_FLAGS)
def test_methods_that_do_not_go_together_are_one_line(project, run_cli, flags, named):
    before = sorted(os.listdir(project.path))
    code, _, err = run_cli("--option", "finetune", *project.flags, *flags)
    assert code == 2
    assert is_one_line(err) and named in err
    assert sorted(os.listdir(project.path)) == before


# Files

ADVANCED = {"mixout": 0.5}
DIGESTED = [
    {"prompt_based": True, "prompt_template": "{sentence} " + "x" * length} for length in (8, 9)
]
SUFFIXES = [({}, ""), ({"tune": "lora", "smart": 1.0}, "-tune-lora-smart-1.0")]


def test_advanced_names_are_for_advanced_methods(project, run_cli):
    names = ["--dev_out", "x-dev-advanced-output.txt", "--test_out", "x-test-advanced-output.txt"]
    plain = {"dev_out": "x-dev-finetuning-output.txt", "test_out": "x-test-finetuning-output.txt"}
    for flags, given in (({}, ()), (ADVANCED, ()), ({}, ("pretrained_model_path",))):
        settings = FinetuneSettings(
            option="finetune",
            pretrained_model_path="model.pt",
            explicit=given,
            methods=methods_of(flags),
            dev_out=names[1],
            test_out=names[3],
        )
        if flags or given:
            settings.check_before_work()
        else:
            with pytest.raises(InputError, match="dev-finetuning-output"):
                settings.check_before_work()
        settings.replace(**plain).check_before_work()
    flags = [text for name, value in ADVANCED.items() for text in (f"--{name}", str(value))]
    assert run_cli("--option", "finetune", *project.flags, *flags, *names)[0] == 0
    assert (project.path / "x-test-advanced-output.txt").exists()


@pytest.mark.parametrize(("flags", "suffix"), SUFFIXES)
def test_the_files_name_tells_what_is_not_at_its_default(flags, suffix):
    assert methods.file_suffix(methods_of(flags)) == suffix


def test_long_or_odd_settings_become_a_digest_in_the_files_name():
    names = {methods.file_suffix(methods_of(flags)) for flags in DIGESTED}
    assert len(names) == len(DIGESTED)
    assert all(re.fullmatch(r"-methods-[0-9a-f]{8}", name) for name in names)


WHOLE_NUMBERS = {"mixout": 0, "smart": 1}


def test_settings_from_code_need_not_be_of_the_very_type(project):
    """As other people's scripts call it: whole numbers for rates."""
    data = {split: f"data/toy-{split}.txt" for split in ("train", "dev", "test")}
    args = SimpleNamespace(
        **data,
        label_names="data/toy-label-mapping.json",
        pretrained_model_path="model.pt",
        max_sentence_len=None,
        seed=1,
        epochs=1,
        option="finetune",
        use_gpu=False,
        dev_out="x-dev-advanced-output.txt",
        test_out="x-test-advanced-output.txt",
        batch_size=4,
        hidden_dropout_prob=0,
        lr=1e-3,
        filepath="m.pt",
        **WHOLE_NUMBERS,
    )
    minllama.tasks.finetune.train(args)
    minllama.tasks.finetune.test(args)
    assert (project.path / "x-dev-advanced-output.txt").exists()
    saved = read_checkpoint("m.pt")["model_config"]
    assert {name: saved[name] for name in WHOLE_NUMBERS} == WHOLE_NUMBERS


# A new method is one file, and one entry of the list

TOY = ["--toy_scale", "1.5", "--toy_penalty", "0.25"]


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(methods, "METHODS", (*methods.METHODS, Toy))


def test_without_its_entry_a_method_is_not_there(project, run_cli):
    assert "--toy_scale" not in run_cli("--help")[1]
    code, _, err = run_cli("--option", "finetune", *project.flags, *TOY)
    assert code == 2 and is_one_line(err) and "--toy_scale" in err


def test_a_new_method_is_in_help(run_cli, toy):
    code, out, _ = run_cli("--help")
    assert code == 0
    section = " ".join(out[out.index(Toy.title) :].split())
    assert "--toy_scale S what the scales begin as" in section
    assert "--toy_penalty X weight of their squared distance from that (default: 0.0)" in section


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (
            ["--prompt_based", *TOY],
            "--toy_scale: does not go with --prompt_based, so there is nothing to scale",
        ),
        (["--mixout", "0.5", *TOY], "--mixout: does not go with --toy_scale"),
        (["--wise_ft", "0.5", *TOY], "--wise_ft: does not go with --toy_scale"),
        (["--option", "prompt", *TOY], "--toy_penalty acts only with --toy_scale"),
        (
            ["--option", "prompt", "--toy_scale", "1.5"],
            "--toy_scale acts only with --option finetune",
        ),
        (["--toy_penalty", "0.25"], "--toy_penalty acts only with --toy_scale"),
        (["--toy_scale", "-1"], "--toy_scale -1.0: out of range"),
        (["--toy_scale", "much"], "--toy_scale"),
    ],
)
def test_a_new_method_is_refused_where_it_does_not_belong(project, run_cli, toy, flags, named):
    before = sorted(os.listdir(project.path))
    code, _, err = run_cli("--option", "finetune", *project.flags, *flags)
    assert code == 2
    assert is_one_line(err) and named in err
    assert sorted(os.listdir(project.path)) == before


@pytest.mark.parametrize("more", [[], ["--pooling", "mean", "--smart", "1"]])
def test_a_new_method_trains_is_saved_and_loads(project, run_cli, toy, tokenizer, more):
    flags = ["--option", "finetune", *project.flags, "--causal", "--epochs", "3", "--lr", "0.1"]
    code, out, err = run_cli(*flags, *TOY, *more)
    assert code == 0, err
    assert f"train {32 * 3 + 3 + 32} of " in out
    losses = [float(loss) for loss in re.findall(r"train loss :: (\S+),", out)]
    assert losses[-1] < losses[0]
    assert saved_file(project).endswith("-toy_scale-1.5-toy_penalty-0.25.pt")
    saved = read_checkpoint(saved_file(project))
    for part in ("args", "model_config"):
        assert (saved[part]["toy_scale"], saved[part]["toy_penalty"]) == (1.5, 0.25)
    names = {"classifier_head.scale", "classifier_head.weight", "classifier_head.bias"}
    assert saved["model"].keys() == names
    assert (saved["model"]["classifier_head.scale"] - 1.5).abs().min() > 1e-3
    written = [(project.path / name).read_text() for name in OUTPUTS]
    assert written == [predicted(project, split, saved, tokenizer) for split in ("dev", "test")]

    for name in OUTPUTS:
        (project.path / name).unlink()
    load = ["--option", "finetune", "--load", saved_file(project)]
    code, again, err = run_cli(*load)
    assert code == 0, err
    assert [(project.path / name).read_text() for name in OUTPUTS] == written
    assert out[out.index("dev acc ::", out.index("load model")) :].strip() in again
    code, _, err = run_cli(*load, "--toy_scale", "2")
    assert code == 2 and is_one_line(err) and "trained with toy_scale 1.5" in err


def predicted(project, split, saved, tokenizer):
    """What the file of predictions is, with the saved tensors put into the formula."""
    pooling = saved["model_config"]["pooling"]
    scale, weight, bias = (
        saved["model"][f"classifier_head.{name}"] for name in ("scale", "weight", "bias")
    )
    llama = make_llama(causal=True)
    lines = []
    for _, sentence in read_labelled(project.path / f"data/toy-{split}.txt"):
        ids = tokenizer.encode(sentence, bos=True, eos=False)
        with torch.no_grad():
            hidden = llama.hidden_states(torch.tensor([ids]))[0]
        x = hidden.mean(0) if pooling == "mean" else hidden[-1]
        lines.append(f"{(weight @ (scale * x) + bias).argmax().item()} ||| {sentence}\n")
    return "".join(lines)


def test_a_saved_run_is_evaluated_with_the_new_method_merged(project, run_cli, toy, monkeypatch):
    assert run_cli("--option", "finetune", *project.flags, *TOY)[0] == 0
    model_eval, heads = minllama.tasks.finetune.model_eval, []

    def recorded(loader, model, *args):
        heads.append(type(model.classifier_head))
        return model_eval(loader, model, *args)

    monkeypatch.setattr(minllama.tasks.finetune, "model_eval", recorded)
    assert run_cli("--option", "finetune", "--load", saved_file(project))[0] == 0
    assert heads == [torch.nn.Linear, torch.nn.Linear]


def test_the_penalty_of_a_new_method_acts(make_model, toy):
    far, near = make_model(toy_scale=1.0), make_model(toy_scale=1.0)
    train(far, toy_scale=1.0)
    train(near, toy_scale=1.0, toy_penalty=1e3)
    distances = [(model.classifier_head.scale - 1).abs().max().item() for model in (far, near)]
    assert 0 < distances[1] < distances[0]


def test_a_file_of_a_method_that_is_gone_is_refused_in_one_line(project, run_cli, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(methods, "METHODS", (*methods.METHODS, Toy))
        assert run_cli("--option", "finetune", *project.flags, *TOY)[0] == 0
    code, _, err = run_cli("--option", "finetune", "--load", saved_file(project))
    assert code == 2 and is_one_line(err) and saved_file(project) in err


# Each method can be deleted with its entry, and nothing else

ROOMS = [path for path in ROOT.iterdir() if path.is_dir() and path.name[0].isalpha()]
SOURCES = sorted(
    path.relative_to(ROOT)
    for path in itertools.chain(ROOT.glob("*.py"), *(room.rglob("*.py") for room in ROOMS))
    if "tests" not in path.relative_to(ROOT).parts
)
MODULES = sorted({cls.__module__ for cls in methods.METHODS})


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports, and what it imports from them, by their full names."""
    package = ".".join(path.parent.parts)
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                module = f"{package}.{module}".rstrip(".")
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def names_in(path: Path) -> set[str]:
    """All names of classes, variables and attributes in a file."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.alias):
            names.update(filter(None, (node.name, node.asname)))
    return names


def test_the_walk_over_the_sources_sees_imports():
    assert {"minllama.methods.recipe", "minllama.methods.recipe.Method"} <= set(
        imported(Path("minllama/methods/lora.py"))
    )
    assert "methods" in imported(Path("run_llama.py"))
    assert {"LoRA", "replace", "requires_grad_"} <= names_in(Path("minllama/methods/lora.py"))
    rooms = {"checkpoints", "common", "inference", "methods", "tasks", "text", "training"}
    assert rooms <= {path.parts[0] for path in SOURCES}


@pytest.mark.parametrize("module", MODULES)
def test_a_methods_file_is_imported_by_the_list_only(module):
    file = Path(*module.split(".")).with_suffix(".py")
    assert module.startswith("methods.") and file in SOURCES
    importers = [str(path) for path in SOURCES if module in imported(path)]
    assert importers == ["methods/__init__.py"]


@pytest.mark.parametrize("cls", methods.METHODS)
def test_a_methods_class_is_named_in_its_file_and_the_list_only(cls):
    named = [str(path) for path in SOURCES if cls.__name__ in names_in(path)]
    assert named == sorted(["methods/__init__.py", f"{cls.__module__.replace('.', '/')}.py"])
