"""Which files `load_pretrained` reads, and which it refuses."""

import argparse
import os
import pickle
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import MODEL_ARGS, assert_refused, make_llama, save_llama
from reference_math import llama_forward

from classifier import LlamaEmbeddingClassifier
from config import LlamaConfig
from llama import load_pretrained
from minllama.checkpoints.pt import read_checkpoint
from minllama.common.errors import InputError
from tokenizer import Tokenizer

TOKENS = torch.tensor([[1, 17, 80, 255]])
EMBEDDING, HEAD = "tok_embeddings.weight", "output.weight"


@pytest.fixture
def llama():
    return make_llama()


@pytest.fixture
def saved(llama, tmp_path):
    """The dict of a checkpoint, to change and write."""
    return torch.load(save_llama(llama, tmp_path / "good.pt"), weights_only=True)


def write(saved, tmp_path):
    torch.save(saved, tmp_path / "changed.pt")
    return tmp_path / "changed.pt"


def same_output(a, b) -> bool:
    with torch.inference_mode():
        return torch.equal(a(TOKENS)[0], b.eval()(TOKENS)[0])


def logits_error(llama, saved, **arguments) -> float:
    """The largest difference from float64 numpy, relative to the largest logit."""
    weights = {name: tensor.numpy() for name, tensor in saved["model"].items()}
    expected, _ = llama_forward(weights, TOKENS.numpy(), MODEL_ARGS | arguments)
    with torch.inference_mode():
        logits = llama.eval()(TOKENS, targets=TOKENS)[0].numpy()
    return np.abs(logits - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("init_weights", [False, True])
def test_own_layout(llama, saved, tmp_path, init_weights):
    """With `init_weights` the random numbers are drawn that the assignment draws, else none."""
    path = write(saved, tmp_path)
    torch.manual_seed(3)
    if init_weights:
        type(llama)(llama.config)
    expected_draw = torch.rand(1)
    torch.manual_seed(3)
    loaded = load_pretrained(path, init_weights=init_weights)
    assert torch.equal(torch.rand(1), expected_draw)
    assert same_output(llama, loaded)
    assert loaded.tok_embeddings.weight is loaded.output.weight
    assert all(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_llama2cs_names_and_the_prefix_of_wrapped_models(llama, saved, tmp_path, prefix):
    saved["model"] = {
        prefix + re.sub(r"compute_(\w)\w*", r"w\1", name): tensor  # wq, wk, wv, wo
        for name, tensor in saved["model"].items()
    }
    assert f"{prefix}layers.1.attention.wo.weight" in saved["model"]
    for name in ("rope.freqs", "freqs_cos", "freqs_sin", "layers.0.attention.mask"):
        saved["model"][prefix + name] = torch.full((1, 1, 4, 4), -torch.inf)
    assert same_output(llama, load_pretrained(write(saved, tmp_path)))


def test_the_assignments_whole_configuration_is_taken(llama, saved, tmp_path):
    """As it is after `vars(LlamaConfig(...))` there; what would change the model is refused."""
    saved["model_args"] |= {"position_embedding_type": "rotary", "use_cache": False}
    saved["model_args"] |= {"return_dict": True, "num_labels": 5, "bos_token_id": None}
    saved["model_args"] |= {"tie_word_embeddings": True, "pruned_heads": {}, "is_decoder": False}
    assert same_output(llama, load_pretrained(write(saved, tmp_path)))
    for name, value in (("position_embedding_type", "absolute"), ("is_encoder_decoder", True)):
        changed = saved | {"model_args": saved["model_args"] | {name: value}}
        with pytest.raises(InputError, match=name):
            load_pretrained(write(changed, tmp_path))


def save_as_the_assignment(classifier, path) -> None:
    """As its `save_model`: with namespaces, and the states of three random generators."""
    names = ("pretrained_model_path", "num_labels", "option", "hidden_dropout_prob")
    config = {name: getattr(classifier.config, name) for name in names}
    saved = {
        "model": classifier.state_dict(),
        "optim": torch.optim.AdamW(classifier.parameters()).state_dict(),
        "args": argparse.Namespace(lr=1e-5, filepath=str(path)),
        "model_config": SimpleNamespace(**config, data_dir="."),
        "system_rng": random.getstate(),
        "numpy_rng": np.random.get_state(),
        "torch_rng": torch.random.get_rng_state(),
    }
    torch.save(saved, path)


def test_the_assignments_fine_tuned_files_are_read_safely(project, run_cli):
    """`--load` evaluates such a file, and its Llama can be used like any other."""
    config = {"pretrained_model_path": "model.pt", "num_labels": 3, "hidden_dropout_prob": 0.3}
    config = SimpleNamespace(**config, option="finetune")
    classifier = LlamaEmbeddingClassifier(config)
    classifier.config = config
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.mul_(1.25)
    save_as_the_assignment(classifier, "finetune-5-1e-05.pt")
    assert same_output(load_pretrained("finetune-5-1e-05.pt"), classifier.llama)
    flags = ["--load", "finetune-5-1e-05.pt", *project.flags, "--batch_size", "1"]
    code, out, err = run_cli("--option", "finetune", *flags)
    assert code == 0 and "dev acc ::" in out, err
    lines = (project.path / "toy-dev-finetuning-output.txt").read_text().splitlines()
    for line in lines:
        label, sentence = line.split(" ||| ")
        ids = Tokenizer().encode(sentence, bos=True, eos=False)
        assert int(label) == classifier.eval()(torch.tensor([ids])).argmax()
    (project.path / "model.pt").unlink()
    result = run_cli("--pretrained-model-path", "finetune-5-1e-05.pt")
    assert_refused(result, "finetune-5-1e-05.pt: fine-tuned from model.pt, which is needed too")
    (project.path / "finetune-5-1e-05.pt").rename("model.pt")
    assert_refused(
        run_cli("--pretrained-model-path", "model.pt"), "model.pt: fine-tuned from model.pt"
    )


@pytest.mark.parametrize("flags", [(), ("--causal", "--tune", "lora")])
def test_our_fine_tuned_files_give_their_llama_or_say_why_not(copy_finetuned, run_cli, flags):
    weights = copy_finetuned(*flags)
    result = run_cli("--pretrained-model-path", weights, "--max_new_tokens", "3")
    if flags:
        assert_refused(result, weights, "only the weights that --tune lora trained")
    else:
        assert result[0] == 0, result
        saved = read_checkpoint(weights)["model"]["llama.norm.weight"]
        assert load_pretrained(weights).norm.weight.equal(saved)


@pytest.mark.parametrize("absent", [EMBEDDING, HEAD])
def test_one_of_the_tied_matrices_is_enough(llama, saved, tmp_path, absent):
    """Unless the file says that they are not tied."""
    del saved["model"][absent]
    assert same_output(llama, load_pretrained(write(saved, tmp_path)))
    saved["model_args"]["tie_embeddings"] = False
    with pytest.raises(InputError, match=f"{absent} is missing"):
        load_pretrained(write(saved, tmp_path))


def test_an_output_head_of_its_own_is_used(saved, tmp_path):
    saved["model"][EMBEDDING] += 1.0
    loaded = load_pretrained(write(saved, tmp_path))
    assert loaded.config.tie_embeddings is False
    assert loaded.tok_embeddings.weight is not loaded.output.weight
    assert logits_error(loaded, saved) < 1e-5
    saved["model_args"]["tie_embeddings"] = True
    with pytest.raises(InputError, match="tied"):
        load_pretrained(write(saved, tmp_path))


def test_lower_precision_is_loaded_as_float32(saved, tmp_path):
    saved["model"] = {name: tensor.bfloat16() for name, tensor in saved["model"].items()}
    loaded = load_pretrained(write(saved, tmp_path))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_theta_and_epsilon_are_used(saved, tmp_path):
    """`norm_eps` is the other name of `layer_norm_eps`."""
    saved["model_args"] |= {"rope_theta": 500.0, "norm_eps": 0.03}
    loaded = load_pretrained(write(saved, tmp_path))
    assert logits_error(loaded, saved, rope_theta=500.0, layer_norm_eps=0.03) < 1e-5
    assert logits_error(loaded, saved) > 0.01


UNSUPPORTED = [{"rope_scaling": None}, {"flash": True}, {"rope_theta": 0}]
UNSUPPORTED += [{"layer_norm_eps": 1e-6, "norm_eps": 1e-5}]


@pytest.mark.parametrize("changes", UNSUPPORTED)
def test_unsupported_settings_are_refused_by_name(saved, tmp_path, changes):
    saved["model_args"] |= changes
    with pytest.raises(InputError, match=next(iter(changes))):
        load_pretrained(write(saved, tmp_path))
    LlamaConfig(**saved["model_args"])  # in code further keywords are accepted


@pytest.mark.parametrize("stored", [None, False, True])
@pytest.mark.parametrize("asked", [None, False, True])
def test_causal_comes_from_the_checkpoint_unless_overridden(saved, tmp_path, stored, asked):
    if stored is not None:
        saved["model_args"]["causal"] = stored
    expected = bool(stored) if asked is None else asked
    assert load_pretrained(write(saved, tmp_path), causal=asked).config.causal is expected


def test_missing_unexpected_and_misshaped_tensors_are_named(saved, tmp_path):
    del saved["model"]["layers.0.ffn_norm.weight"]
    saved["model"]["layers.0.extra.weight"] = torch.zeros(2)
    saved["model"]["layers.1.feed_forward.w2.weight"] = torch.zeros(32, 95)
    saved["model"][EMBEDDING] = torch.zeros(3)
    with pytest.raises(InputError) as error:
        load_pretrained(write(saved, tmp_path))
    for complaint in (
        "layers.0.ffn_norm.weight is missing",
        "layers.0.extra.weight is unexpected",
        "layers.1.feed_forward.w2.weight has shape (32, 95), expected (32, 96)",
        "tok_embeddings.weight has shape (3,), expected (320, 32)",
    ):
        assert complaint in str(error.value)


class Attack:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.system, (f"touch {self.folder}/attacked",)


def write_broken_files(saved, folder) -> dict[str, str]:
    """Write files that are no checkpoint; for each name a word that the message must hold."""
    good = (folder / "good.pt").read_bytes()
    contents = {
        "truncated": (good[: len(good) // 2], "incomplete"),
        "page": (b"\n<!DOCTYPE html><html>404</html>", "web page"),
        "empty": (b"", "empty"),
        "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        "garbage": (b"\x00\x01garbage" * 100, "not a checkpoint"),
        "pickle": (pickle.dumps(Attack(folder)), "could run code"),
    }
    for name, (content, _) in contents.items():
        (folder / f"{name}.pt").write_bytes(content)
    tensors, arguments = saved["model"], saved["model_args"]
    values = {
        "attack": (saved | {"model_args": Attack(folder)}, "could run code"),
        "no-args": ({"model": tensors}, "model_args"),
        "no-model": ({"model_args": arguments}, "'model'"),
        "list": ([1, 2], "list"),
        "tensor": (torch.zeros(2), "Tensor"),
    }
    query = "layers.0.attention.wq.weight"
    for name, change, word in (
        ("no-embedding", {EMBEDDING: [1.0]}, EMBEDDING),
        ("integers", {HEAD: torch.ones(320, 32).int()}, HEAD),
        ("twice", {query: torch.zeros(32, 32)}, "compute_query.weight is there twice"),
        ("nan", {"norm.weight": torch.full((32,), torch.nan)}, "norm.weight"),
        ("large", {"norm.weight": torch.full((32,), 1e300, dtype=torch.float64)}, "not finite"),
        ("sparse", {HEAD: torch.zeros(320, 32).to_sparse()}, "sparse"),
    ):
        values[name] = saved | {"model": tensors | change}, word
    wrong = {"dim": "32", "n_heads": 5, "n_layers": -1, "max_seq_len": None, "vocab_size": 320.0}
    for name, value in (wrong | {"layer_norm_eps": "x", "causal": "no", "self": 1}).items():
        values[name] = saved | {"model_args": arguments | {name: value}}, name
    long = arguments | {"max_seq_len": 2**30}  # whose rotary table would not fit the memory
    values["long"] = saved | {"model_args": long}, "max_seq_len is 1073741824"
    for name, (value, _) in values.items():
        torch.save(value, folder / f"{name}.pt")
    return {name: word for name, (_, word) in (contents | values).items()}


def test_other_files_are_refused_in_one_line_and_run_nothing(saved, project, run_cli):
    for name, word in write_broken_files(saved, project.path).items():
        code, _, err = run_cli("--pretrained-model-path", f"{name}.pt")
        assert code == 2, name
        assert err.startswith("error: ") and err.count("\n") == 1, err
        assert f"{name}.pt" in err and word in err, err
    assert not (project.path / "attacked").exists()
    pickle.loads((project.path / "pickle.pt").read_bytes())  # as a careless program would
    assert (project.path / "attacked").exists()
    code, _, err = run_cli("--pretrained-model-path", "absent.pt")
    assert code == 2 and "absent.pt: no such file" in err and "setup.sh" in err
    for path, remedy in (
        ("https://www.cs.cmu.edu/~vijayv/stories42M.pt", "download it"),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "hf download TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
    ):
        assert_refused(run_cli("--pretrained-model-path", path), f"error: {path}: ", remedy)
