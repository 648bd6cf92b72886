"""LoRA against its definition."""

import torch
from conftest import make_llama
from methods_kit import BATCH, predictions, saved_file, train

from minllama.checkpoints.pt import read_checkpoint
from minllama.methods.lora import LoRA, LoRALinear

pytest_plugins = ["methods_fixtures"]


def test_lora_is_its_definition_and_merges():
    torch.manual_seed(0)
    linear = LoRALinear(make_llama().layers[0].feed_forward.w1, rank=4, alpha=12.0, dropout=0.0)
    torch.nn.init.normal_(linear.lora_b)
    x = torch.randn(5, 9, 32)
    tensors = (linear.weight, linear.lora_a, linear.lora_b)
    w, a, b = (tensor.detach().double() for tensor in tensors)
    expected = x.double() @ w.T + 12 / 4 * (x.double() @ a.T @ b.T)
    assert torch.allclose(linear(x).double(), expected, atol=1e-4)
    assert torch.allclose(linear.merged()(x).double(), expected, atol=1e-4)


def test_lora_drops_inputs_of_the_update_in_training_only():
    torch.manual_seed(0)
    linear = LoRALinear(make_llama().layers[0].feed_forward.w1, 4, 12.0, dropout=0.5)
    x = torch.randn(5, 9, 32)
    assert torch.equal(linear(x), linear(x))  # B is zero
    torch.nn.init.normal_(linear.lora_b)
    assert not torch.equal(linear(x), linear(x))
    linear.eval()
    assert torch.equal(linear(x), linear(x))


def test_merged_lora_predicts_the_same(make_model):
    model = make_model(tune="lora")
    train(model)
    expected = predictions(model)
    LoRA().merge(model)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    assert (predictions(model) - expected).abs().max() < 1e-5


def test_all_linear_layers_of_the_layers_have_an_update(make_model):
    model = make_model(tune="lora")
    assert sum(isinstance(module, LoRALinear) for module in model.modules()) == 2 * 7


def test_loras_gradient_reaches_a_and_b_only(make_model):
    model = make_model(tune="lora")
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(parameter, std=0.1)
    model(BATCH.token_ids, BATCH.lengths)[:, 0].sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {n for n, _ in model.named_parameters() if "lora_" in n or "head" in n}
    assert all(p.grad.abs().max() > 0 for n, p in model.named_parameters() if "lora_" in n)


def test_sizes_reach_the_updates(trained):
    flags = ["--lora_rank", "2", "--lora_alpha", "5", "--lora_dropout", "0.25"]
    model = trained("--tune", "lora", *flags).model
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    assert {(layer.scale, layer.dropout.p, len(layer.lora_a)) for layer in layers} == {
        (2.5, 0.25, 2)
    }


def test_a_saved_adapter_is_small_and_needs_its_base(project, run_cli):
    flags = [*project.flags, "--option", "finetune", "--tune", "lora"]
    assert run_cli(*flags, "--lr", "1e-3")[0] == 0
    saved = read_checkpoint(project.path / "finetune-1-0.001-tune-lora.pt")
    assert all("lora_" in name or "classifier_head" in name for name in saved["model"])
    (project.path / "model.pt").rename(project.path / "base.pt")
    load = ["--option", "finetune", "--load", saved_file(project)]
    code, _, err = run_cli(*load, *project.flags, "--pretrained-model-path", "base.pt")
    assert code == 0, err
