"""What concerns all methods: what trains, which go together, their flags and file names."""

import itertools
import os
import re

import pytest
import torch
from conftest import assert_refused
from methods_kit import (
    BATCH,
    dev_loss,
    loss_of,
    make_training,
    methods_of,
    predictions,
    settings_of,
    snapshot,
    train,
)

from minllama import methods
from minllama.checkpoints.pt import read_checkpoint
from minllama.common.errors import InputError
from minllama.methods.lora import LoRALinear
from minllama.methods.saved import count_parameters, load_weights
from minllama.training import run
from minllama.training.activation_checkpointing import checkpoint_activations

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


@pytest.mark.parametrize("tune", ["head", "lora", "adapter", "norm"])
def test_nothing_changes_before_training(make_model, tune):
    assert torch.allclose(predictions(make_model(tune=tune)), predictions(make_model()), atol=1e-6)


@pytest.mark.parametrize("prompt_based", [False, True])
@pytest.mark.parametrize("tune", TRAINED_PARTS)
def test_trained_tensors_change_and_load_onto_the_others_which_stay(
    make_classifier, make_model, tune, prompt_based
):
    if prompt_based and tune == "head":
        return  # nothing to train
    flags = {"tune": tune, "prompt_based": prompt_based}
    classifier = make_classifier(**flags)
    model = classifier.model
    before, loss = snapshot(model), dev_loss(model)
    train(classifier, 6)
    assert dev_loss(model) < loss
    n_trained = 0
    for name, parameter in model.named_parameters():
        trains = TRAINED_PARTS[tune] in name or name.startswith("classifier_head")
        assert torch.equal(parameter, before[name]) != trains, name
        n_trained += trains * parameter.numel()
    assert count_parameters(model)[0] == n_trained

    saved = read_checkpoint(settings_of(classifier).filepath)["model"]
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names <= saved.keys() and (tune == "full" or saved.keys() == names)
    other = make_model(**flags)
    load_weights(other, saved, "trained.pt")
    assert torch.equal(predictions(other), predictions(model))
    more = saved | {"extra.weight": torch.zeros(1)}
    less = dict(list(saved.items())[1:])
    reshaped = {name: tensor[None] for name, tensor in saved.items()}
    for wrong in (more, less, reshaped):
        with pytest.raises(InputError, match="tensors"):
            load_weights(make_model(**flags), wrong, "trained.pt")


def test_methods_go_with_checkpointed_activations(make_classifier):
    gradients = []
    for checkpointing in (False, True):
        classifier = make_classifier(hidden_dropout_prob=0.2, smart=1.0, mixout=0.4)
        if checkpointing:
            checkpoint_activations(classifier.model.llama.layers)
        training = make_training(classifier)
        training.model.train()
        torch.manual_seed(0)
        loss_of(training, BATCH).backward()
        gradients.append({name: p.grad for name, p in training.model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("flags", TWO_BY_TWO, ids=lambda flags: " ".join(map(str, flags.values())))
def test_two_methods_train_and_load_together_or_are_refused(make_classifier, flags):
    for refused, named in NOT_TOGETHER:
        if flags == refused:
            with pytest.raises(InputError, match=named):
                train(make_classifier(**flags))
            return
    classifier = make_classifier(hidden_dropout_prob=0.1, **flags)
    before = predictions(classifier.model)
    train(classifier)
    after = predictions(classifier.model)
    assert after.isfinite().all() and not torch.allclose(after, before, atol=1e-3)
    other = make_classifier(**flags)
    load_weights(other.model, run.trained_tensors(classifier.model), "trained.pt")
    other.merge()
    assert not any(isinstance(module, LoRALinear) for module in other.model.modules())
    assert torch.allclose(predictions(other.model), after, atol=1e-4)


# Flags that are refused

BAD_METHODS = [
    (["--mixout", "1"], "--mixout"),
    (["--wise_ft", "1.5"], "--wise_ft"),
    (["--tune", "lora", "--lora_rank", "33"], "--lora_rank"),
    (["--tune", "adapter", "--adapter_size", "33"], "--adapter_size"),
    (["--shots", "5"], "label 0 has 4 sentences"),
    (["--prompt_based", "--prompt_template", "no place"], "--prompt_template"),
    (["--prompt_based", "--label-names", "absent.json"], "absent.json"),
    (["--tune", "prefix", "--prefix_length", "128"], "--prefix_length"),
    (["--load", "absent.pt"], "absent.pt"),
    (["--load", "model.pt"], "not a file that --option finetune saved"),
    (["--prompt_based", "--causal", "--activation_checkpointing"], "--activation_checkpointing"),
]
UNUSED_FLAGS = [
    (["--lora_rank", "4"], "--lora_rank acts only with --tune lora"),
    (["--tune", "lora", "--adapter_size", "4"], "--adapter_size acts only with --tune adapter"),
    (
        ["--prompt_template", "{sentence}"],
        "acts only with --option prompt or predict or --prompt_based",
    ),
    (["--option", "prompt", "--mixout", "0.5"], "--mixout acts only with --option finetune"),
    (["--option", "generate", "--report"], "--report acts only with --option prompt or finetune"),
    (["--option", "pretrain", "--tune", "lora"], "--tune acts only with --option finetune"),
    (["--option", "pretrain", "--pooling", "mean"], "--pooling acts only with --option finetune"),
    (["--dropout", "0.1"], "--dropout acts only with --option pretrain"),
]


@pytest.mark.parametrize(("flags", "named"), BAD_METHODS + UNUSED_FLAGS)
def test_flags_that_do_not_go_together_are_one_line(project, run_cli, flags, named):
    before = sorted(os.listdir(project.path))
    assert_refused(run_cli("--option", "finetune", *project.flags, *flags), named)
    assert sorted(os.listdir(project.path)) == before


# Files


def test_the_files_name_has_what_is_not_at_its_default_or_a_digest():
    assert methods.file_suffix(methods_of({})) == ""
    flags = {"tune": "lora", "smart": 1.0}
    assert methods.file_suffix(methods_of(flags)) == "-tune-lora-smart-1.0"
    names = {
        methods.file_suffix(methods_of({"prompt_based": True, "prompt_template": template}))
        for template in ("{sentence} " + "x" * 8, "{sentence} " + "x" * 9)
    }
    assert len(names) == 2
    assert all(re.fullmatch(r"-methods-[0-9a-f]{8}", name) for name in names)
