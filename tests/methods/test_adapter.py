"""Adapters against their definition."""

import torch

pytest_plugins = ["methods_fixtures"]


def test_an_adapter_is_its_definition(make_model):
    adapter = make_model(tune="adapter").llama.layers[0].attention.adapter
    torch.nn.init.normal_(adapter.up.weight)
    h = torch.randn(2, 3, 32)
    down, up = (layer.weight.detach().double() for layer in (adapter.down, adapter.up))
    expected = h.double() + torch.relu(h.double() @ down.T) @ up.T
    assert torch.allclose(adapter(h).double(), expected, atol=1e-4)


def test_every_sub_layer_passes_its_output_through_its_adapter(make_model):
    x = torch.randn(2, 3, 32)
    layers = zip(make_model(tune="adapter").llama.layers, make_model().llama.layers, strict=True)
    for adapted_layer, plain_layer in layers:
        for name in ("attention", "feed_forward"):
            adapted = adapted_layer.get_submodule(name)
            torch.nn.init.normal_(adapted.adapter.up.weight)
            plain = plain_layer.get_submodule(name)(x)
            assert not torch.allclose(adapted(x), plain, atol=1e-2)
            assert torch.equal(adapted(x), adapted.adapter(plain))


def test_its_size_reaches_the_adapters(trained):
    model = trained("--tune", "adapter", "--adapter_size", "3").model
    assert model.llama.layers[0].attention.adapter.down.weight.shape == (3, 32)
