"""Training the norms' scales: every norm's, and nothing else but the head."""

pytest_plugins = ["methods_fixtures"]


def test_every_norm_trains_its_scale_and_the_head_with_them(make_model):
    norms = {f"llama.layers.{i}.{norm}" for i in (0, 1) for norm in ("attention_norm", "ffn_norm")}
    scales = {f"{norm}.weight" for norm in (*norms, "llama.norm")}
    trained = {name for name, p in make_model(tune="norm").named_parameters() if p.requires_grad}
    assert trained == scales | {"classifier_head.weight", "classifier_head.bias"}
