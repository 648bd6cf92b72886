"""Which files `load_pretrained` takes, and what it says of others."""

import os
import pickle
import re

import numpy as np
import pytest
import torch
from conftest import MODEL_ARGS, make_llama, save_llama
from reference_math import llama_forward

from config import LlamaConfig
from llama import load_pretrained
from minllama.checkpoints.pt import read_checkpoint
from minllama.common.errors import InputError

TOKENS = torch.tensor([[1, 17, 80, 255]])


@pytest.fixture
def llama():
    return make_llama()


@pytest.fixture
def saved(llama, tmp_path):
    """A checkpoint's dict, to change and write."""
    return torch.load(save_llama(llama, tmp_path / "good.pt"), weights_only=True)


def write(saved, tmp_path):
    torch.save(saved, tmp_path / "changed.pt")
    return tmp_path / "changed.pt"


def same_output(a, b) -> bool:
    with torch.inference_mode():
        return torch.equal(a(TOKENS)[0], b.eval()(TOKENS)[0])


def test_own_layout(llama, saved, tmp_path):
    loaded = load_pretrained(write(saved, tmp_path))
    assert same_output(llama, loaded)
    assert loaded.tok_embeddings.weight is loaded.output.weight


def test_other_names_and_prefix(llama, saved, tmp_path):
    short = {"query": "wq", "key": "wk", "value": "wv", "output": "wo"}
    saved["model"] = {
        "_orig_mod." + re.sub(r"compute_(\w+)", lambda m: short[m[1]], name): tensor
        for name, tensor in saved["model"].items()
    }
    assert "_orig_mod.layers.1.attention.wo.weight" in saved["model"]
    assert "_orig_mod.output.weight" in saved["model"]
    assert same_output(llama, load_pretrained(write(saved, tmp_path)))


@pytest.mark.parametrize("absent", ["tok_embeddings.weight", "output.weight"])
def test_one_of_the_tied_matrices_is_enough(llama, saved, tmp_path, absent):
    del saved["model"][absent]
    assert same_output(llama, load_pretrained(write(saved, tmp_path)))


def test_an_output_head_of_its_own_is_used(saved, tmp_path):
    saved["model"]["tok_embeddings.weight"] += 1.0
    loaded = load_pretrained(write(saved, tmp_path)).eval()
    assert loaded.config.tie_embeddings is False
    assert loaded.tok_embeddings.weight is not loaded.output.weight
    weights = {name: tensor.numpy() for name, tensor in saved["model"].items()}
    expected, _ = llama_forward(weights, TOKENS.numpy(), MODEL_ARGS)
    with torch.inference_mode():
        logits, _ = loaded(TOKENS, targets=TOKENS)
    assert np.abs(logits.numpy() - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("absent", ["tok_embeddings.weight", "output.weight"])
def test_what_is_said_to_be_untied_needs_both(saved, tmp_path, absent):
    saved["model_args"]["tie_embeddings"] = False
    del saved["model"][absent]
    with pytest.raises(InputError, match=f"{absent} is missing"):
        load_pretrained(write(saved, tmp_path))


def test_what_is_said_to_be_tied_must_be_equal(saved, tmp_path):
    saved["model_args"]["tie_embeddings"] = True
    saved["model"]["tok_embeddings.weight"] += 1.0
    with pytest.raises(InputError, match="said to be tied"):
        load_pretrained(write(saved, tmp_path))


def test_lower_precision_is_loaded_as_float32(saved, tmp_path):
    saved["model"] = {name: tensor.bfloat16() for name, tensor in saved["model"].items()}
    loaded = load_pretrained(write(saved, tmp_path))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


@pytest.mark.parametrize("init_weights", [False, True])
def test_weights_need_no_drawing(llama, saved, tmp_path, init_weights):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    loaded = load_pretrained(write(saved, tmp_path), init_weights=init_weights)
    assert torch.equal(torch.get_rng_state(), before) != init_weights
    assert same_output(llama, loaded)
    assert loaded.tok_embeddings.weight is loaded.output.weight
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_theta_and_epsilon_are_used(saved, tmp_path):
    """They change the logits as float64 numpy says, and norm_eps is the other name."""
    names = {"rope_theta": 500.0, "norm_eps": 0.03}
    saved["model_args"] |= names
    loaded = load_pretrained(write(saved, tmp_path)).eval()
    assert (loaded.config.rope_theta, loaded.config.layer_norm_eps) == (500.0, 0.03)
    weights = {name: tensor.numpy() for name, tensor in saved["model"].items()}
    arguments = MODEL_ARGS | {"rope_theta": 500.0, "layer_norm_eps": 0.03}
    expected, _ = llama_forward(weights, TOKENS.numpy(), arguments)
    plain, _ = llama_forward(weights, TOKENS.numpy(), MODEL_ARGS)
    with torch.inference_mode():
        logits, _ = loaded(TOKENS, targets=TOKENS)
    assert np.abs(logits.numpy() - expected).max() < 1e-5 * np.abs(expected).max()
    assert np.abs(plain - expected).max() > 0.01 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"rope_scaling": None}, "not understood: rope_scaling"),
        ({"rope_scaling": 2.0, "flash": True}, "not understood: flash, rope_scaling"),
        ({"norm_eps": 1e-6, "layer_norm_eps": 1e-5}, "norm_eps and layer_norm_eps differ"),
        ({"rope_theta": 0}, "rope_theta is 0"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(saved, tmp_path, changes, complaint):
    saved["model_args"] |= changes
    with pytest.raises(InputError, match=complaint):
        load_pretrained(write(saved, tmp_path))
    LlamaConfig(**saved["model_args"])  # in code further keywords are taken


def test_causal_comes_from_the_checkpoint_unless_overridden(saved, tmp_path):
    assert load_pretrained(write(saved, tmp_path)).config.causal is False
    assert load_pretrained(write(saved, tmp_path), causal=True).config.causal is True
    saved["model_args"]["causal"] = True
    assert load_pretrained(write(saved, tmp_path)).config.causal is True
    assert load_pretrained(write(saved, tmp_path), causal=False).config.causal is False


def test_missing_unexpected_and_misshaped_tensors_are_named(saved, tmp_path):
    del saved["model"]["layers.0.ffn_norm.weight"]
    saved["model"]["layers.0.extra.weight"] = torch.zeros(2)
    saved["model"]["layers.1.feed_forward.w2.weight"] = torch.zeros(32, 95)
    saved["model"]["tok_embeddings.weight"] = torch.zeros(3)
    with pytest.raises(InputError) as error:
        load_pretrained(write(saved, tmp_path))
    message = str(error.value)
    assert "layers.0.ffn_norm.weight is missing" in message
    assert "layers.0.extra.weight is unexpected" in message
    assert "layers.1.feed_forward.w2.weight has shape (32, 95), expected (32, 96)" in message
    assert "tok_embeddings.weight has shape (3,), expected (320, 32)" in message


def test_no_random_numbers_are_drawn_by_the_layout_check(llama, saved, tmp_path):
    """The draws of one initialisation, no more: those that follow must be the reference's."""
    path = write(saved, tmp_path)
    torch.manual_seed(3)
    load_pretrained(path)
    after_loading = torch.rand(1)
    torch.manual_seed(3)
    type(llama)(llama.config)
    assert torch.equal(torch.rand(1), after_loading)


def broken_files(saved, folder):
    """Files that are no checkpoint, and a word that the message must hold."""
    good = (folder / "good.pt").read_bytes()

    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {folder}/attacked",)

    def dump(obj):
        torch.save(obj, folder / "scratch.pt")
        return (folder / "scratch.pt").read_bytes()

    args = saved["model_args"]
    return {
        "truncated.pt": (good[: len(good) // 2], "incomplete"),
        "page.pt": (b"\n<!DOCTYPE html><html>404</html>", "web page"),
        "empty.pt": (b"", "empty"),
        "garbage.pt": (b"\x00\x01garbage" * 100, "not a checkpoint"),
        "pickle.pt": (pickle.dumps(Attack()), "could run code"),
        "attack.pt": (dump(saved | {"model_args": Attack()}), "could run code"),
        "no-args.pt": (dump({"model": saved["model"]}), "model_args"),
        "no-model.pt": (dump({"model_args": args}), "'model'"),
        "list.pt": (dump([1, 2]), "list"),
        "tensor.pt": (dump(torch.zeros(2)), "Tensor"),
        "odd-heads.pt": (
            dump(saved | {"model_args": args | {"n_heads": 5}}),
            "multiple of n_heads",
        ),
        "text-dim.pt": (dump(saved | {"model_args": args | {"dim": "32"}}), "model_args"),
        "not-tensors.pt": (dump(saved | {"model": {"norm.weight": 3}}), "norm.weight"),
        "no-embedding.pt": (
            dump(saved | {"model": saved["model"] | {"tok_embeddings.weight": [1.0]}}),
            "tok_embeddings.weight is no tensor",
        ),
        "integers.pt": (
            dump(saved | {"model": {k: v.int() for k, v in saved["model"].items()}}),
            "norm.weight is no tensor of floating-point numbers",
        ),
        "twice.pt": (
            dump(
                saved
                | {"model": saved["model"] | {"layers.0.attention.wq.weight": torch.zeros(32, 32)}}
            ),
            "layers.0.attention.compute_query.weight is there twice",
        ),
        "nan.pt": (
            dump(saved | {"model": saved["model"] | {"norm.weight": torch.full((32,), torch.nan)}}),
            "norm.weight has values that are not finite",
        ),
        "sparse.pt": (
            dump(saved | {"model": {"output.weight": torch.zeros(320, 32).to_sparse()}}),
            "it names torch._utils._rebuild_sparse_tensor",
        ),
        **{
            f"odd-{name}.pt": (dump(saved | {"model_args": args | {name: value}}), name)
            for name, value in [
                ("n_heads", 0),
                ("n_layers", -1),
                ("max_seq_len", None),
                ("layer_norm_eps", "x"),
                ("causal", "no"),
                ("vocab_size", 320.0),
                ("self", 1),
            ]
        },
    }


def test_other_files_are_one_line_and_run_nothing(
    saved, tmp_path, run_cli, monkeypatch, tokenizer_path
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    for name, (content, word) in broken_files(saved, tmp_path).items():
        (tmp_path / name).write_bytes(content)
        code, _, err = run_cli("--pretrained-model-path", name)
        assert code == 2, name
        assert err.startswith("error: ") and err.count("\n") == 1, err
        assert name in err and word in err, err
    assert not (tmp_path / "attacked").exists()
    (tmp_path / "stories42M.pt").write_bytes((tmp_path / "truncated.pt").read_bytes())
    assert "`bash setup.sh` fetches it again" in run_cli()[2]
    code, _, err = run_cli("--pretrained-model-path", "absent.pt")
    assert code == 2 and "absent.pt: no such file" in err and "setup.sh" in err


def test_the_attack_would_work_on_a_careless_loader(saved, tmp_path):
    content, _ = broken_files(saved, tmp_path)["pickle.pt"]
    pickle.loads(content)
    assert (tmp_path / "attacked").exists()


def test_reading_keeps_plain_values(tmp_path):
    torch.save({"a": [1, 2.5, "x", None], "b": torch.ones(2)}, tmp_path / "c.pt")
    assert read_checkpoint(tmp_path / "c.pt")["a"] == [1, 2.5, "x", None]
