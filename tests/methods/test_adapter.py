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


def test_an_adapter_stands_behind_every_sub_layer(make_model):
    for layer in make_model(tune="adapter").llama.layers:
        for adapted in (layer.attention, layer.feed_forward):
            torch.nn.init.normal_(adapted.adapter.up.weight)
            x = torch.randn(2, 3, 32)
            expected = adapted.adapter(adapted.wrapped(x))
            assert not torch.allclose(expected, adapted.wrapped(x), atol=1e-2)
            assert torch.equal(adapted(x), expected)


def test_its_size_reaches_the_adapters(trained):
    model = trained("--tune", "adapter", "--adapter_size", "3").model
    assert model.llama.layers[0].attention.adapter.down.weight.shape == (3, 32)
