"""LoRA against its definition."""

import torch

from minllama.methods.lora import LoRALinear

pytest_plugins = ["methods_fixtures"]


def test_lora_is_its_definition_in_every_linear_layer_of_the_layers(make_model):
    model = make_model(tune="lora", lora_rank=4, lora_alpha=12.0)
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    assert len(layers) == 2 * 7
    for linear in layers:
        torch.nn.init.normal_(linear.lora_b)
        x = torch.randn(5, 9, linear.in_features)
        tensors = (linear.weight, linear.lora_a, linear.lora_b)
        w, a, b = (tensor.detach().double() for tensor in tensors)
        expected = x.double() @ w.T + 12 / 4 * (x.double() @ a.T @ b.T)
        torch.testing.assert_close(linear(x).double(), expected, atol=1e-3, rtol=1e-5)


def test_lora_drops_inputs_of_the_update_in_training_only(make_model):
    model = make_model(tune="lora", lora_dropout=0.5)
    linear = model.llama.layers[0].feed_forward.w1.train()
    x = torch.randn(5, 9, 32)
    assert torch.equal(linear(x), linear(x))  # B is zero
    torch.nn.init.normal_(linear.lora_b)
    assert not torch.equal(linear(x), linear(x))
    linear.eval()
    assert torch.equal(linear(x), linear(x))
