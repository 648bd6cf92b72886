"""Adapters against their definition."""

import torch

pytest_plugins = ["methods_fixtures"]


def test_every_sub_layer_passes_its_output_through_its_adapter(make_model):
    """h + relu(h Dᵀ) Uᵀ of the plain sub-layer's output h."""
    x = torch.randn(2, 3, 32)
    adapted_layers = make_model(tune="adapter", adapter_size=5).llama.layers
    for adapted_layer, plain_layer in zip(adapted_layers, make_model().llama.layers, strict=True):
        for name in ("attention", "feed_forward"):
            adapted = adapted_layer.get_submodule(name)
            torch.nn.init.normal_(adapted.adapter.up.weight)
            down, up = (w.detach().double() for w in adapted.adapter.parameters())
            assert down.shape == (5, 32)
            h = plain_layer.get_submodule(name)(x).double()
            expected = h + torch.relu(h @ down.T) @ up.T
            torch.testing.assert_close(adapted(x).double(), expected, atol=1e-4, rtol=1e-5)
            assert not torch.allclose(expected, h, atol=1e-2)
