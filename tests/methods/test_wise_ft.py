"""WiSE-FT: interpolations of the weights before and after training, and which one is kept."""

import re

import torch
from conftest import make_llama
from methods_kit import make_training, snapshot

from minllama.checkpoints.pt import read_checkpoint
from minllama.methods.wise_ft import interpolate

pytest_plugins = ["methods_fixtures"]


def test_interpolated_weights_are_exact_at_both_ends(make_model):
    model = make_model()
    start = snapshot(model)
    end = {name: tensor + torch.randn_like(tensor) for name, tensor in start.items()}
    for alpha, expected in ((0.0, start), (1.0, end)):
        interpolate(model, start, end, alpha)
        for name, tensor in snapshot(model).items():
            assert torch.equal(tensor, expected[name]), name


def test_a_new_head_starts_as_the_mean_embeddings_of_the_names(make_classifier):
    classifier = make_classifier(wise_ft=[0.5])
    model = make_training(classifier).model
    ids = classifier.tokenizer.encode("fair enough", bos=False, eos=False)
    assert len(ids) > 1
    expected = model.llama.tok_embeddings.weight[ids].mean(0)
    assert torch.allclose(model.classifier_head.weight[1], expected)
    assert not model.classifier_head.bias.any()


def test_the_best_interpolation_of_start_and_best_epoch_is_kept(project, run_cli, scripted_dev):
    flags = ["--option", "finetune", *project.flags, "--lr", "1e-3", "--causal", "--seed", "3"]
    flags += ["--wise_ft", "1", "0", "0.4", "--epochs", "3"]

    def trained(*accuracies: float) -> dict[str, torch.Tensor]:
        scripted_dev(*accuracies)
        code, out, _ = run_cli(*flags, "--fresh")
        assert code == 0
        (path,) = project.path.glob("finetune-*.pt")
        best = sorted(zip(accuracies[3:], ("0", "0.4", "1"), strict=True))[-1][1]
        assert f"keep alpha {best}\n" in out
        curve = re.findall(r"alpha (\S+): dev acc :: (\S+)", out)
        assert [float(accuracy) for _, accuracy in curve] == list(accuracies[3:])
        return read_checkpoint(path)["model"]

    best_epoch = trained(0.3, 0.6, 0.4, 0.5, 0.2, 0.7)
    kept = trained(0.3, 0.6, 0.4, 0.5, 0.7, 0.2)
    for name, start in make_llama().state_dict().items():
        expected = 0.6 * start + 0.4 * best_epoch[f"llama.{name}"]
        assert torch.allclose(kept[f"llama.{name}"], expected, atol=1e-6), name
    assert not torch.equal(kept["llama.norm.weight"], best_epoch["llama.norm.weight"])
