"""Training the new head only, or the norms' scales."""

from methods_kit import snapshot, train

pytest_plugins = ["methods_fixtures"]

HEAD = {"classifier_head.weight", "classifier_head.bias"}


def names_of_changed(model):
    before = snapshot(model)
    train(model)
    return {name for name, tensor in snapshot(model).items() if not tensor.equal(before[name])}


def test_the_head_trains_alone(make_model):
    assert names_of_changed(make_model(tune="head")) == HEAD


def test_every_norm_trains_its_scale_and_the_head_with_them(make_model):
    norms = {f"llama.layers.{i}.{norm}" for i in (0, 1) for norm in ("attention_norm", "ffn_norm")}
    scales = {f"{norm}.weight" for norm in (*norms, "llama.norm")}
    assert names_of_changed(make_model(tune="norm")) == scales | HEAD
