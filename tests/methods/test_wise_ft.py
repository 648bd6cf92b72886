"""WiSE-FT: mixtures of the weights before and after training, and which one is kept."""

import re

import torch
from methods_kit import make_recipe, saved_file, snapshot, train

import minllama.tasks.finetune
from minllama.checkpoints.pt import read_checkpoint
from minllama.methods.wise_ft import mix

pytest_plugins = ["methods_fixtures"]


def test_mixed_weights_are_between_and_exact_at_both_ends(make_model):
    model = make_model()
    start = snapshot(model)
    train(model)
    end = snapshot(model)
    for alpha, expected in ((0.0, start), (1.0, end)):
        mix(model, start, end, alpha)
        for name, tensor in snapshot(model).items():
            assert torch.equal(tensor, expected[name]), name
    mix(model, start, end, 0.25)
    for name, tensor in snapshot(model).items():
        assert torch.allclose(tensor, 0.75 * start[name] + 0.25 * end[name], atol=1e-6)


def test_the_best_mixture_on_dev_is_kept(make_model, capsys):
    model = make_model()
    recipe = make_recipe(model, wise_ft=[1.0, 0.0, 0.5])
    start = snapshot(model)
    embedding = model.llama.tok_embeddings.weight
    assert torch.allclose(model.classifier_head.weight[1], embedding[[6, 7]].mean(0))
    assert not model.classifier_head.bias.any()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    accuracies = iter([0.2, 0.6, 0.4])
    recipe.evaluate = lambda: next(accuracies)
    (finish,) = recipe.finish
    finish()
    assert "keep alpha 0.5" in capsys.readouterr().out
    for name, tensor in snapshot(model).items():
        assert torch.allclose(tensor, start[name] + 0.5, atol=1e-5), name


def test_wise_ft_mixes_the_start_and_the_best_epoch_by_dev(project, run_cli, fake_dev, monkeypatch):
    fake_dev(0.3, 0.6, 0.4, 0.5, 0.7, 0.2)
    saved = []
    made = minllama.tasks.finetune.saved_model

    def recorded(model, *args):
        saved.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return made(model, *args)

    monkeypatch.setattr(minllama.tasks.finetune, "saved_model", recorded)
    flags = ["--option", "finetune", *project.flags, "--epochs", "3", "--lr", "1e-3"]
    code, out, _ = run_cli(*flags, "--causal", "--wise_ft", "0", "0.4", "1")
    assert code == 0
    curve = re.findall(r"alpha (\S+): dev acc :: (\S+)", out)
    assert curve == [("0", "0.500"), ("0.4", "0.700"), ("1", "0.200")]
    assert "keep alpha 0.4" in out
    _, best, kept = saved  # of epochs 0 and 1, and at the end
    start = read_checkpoint("model.pt")["model"]
    for name, tensor in read_checkpoint(saved_file(project))["model"].items():
        assert torch.equal(tensor, kept[name])
        if name.startswith("llama."):
            mixed = 0.6 * start[name.removeprefix("llama.")] + 0.4 * best[name]
            assert torch.allclose(tensor, mixed, atol=1e-6), name
            assert not torch.equal(tensor, best[name]), name
