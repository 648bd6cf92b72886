"""The names of the assignment's modules that other people's code uses, with their meaning."""

import importlib
import inspect
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, make_llama

import rope
import run_llama
from config import LlamaConfig, PretrainedConfig
from tokenizer import Tokenizer

NAMES = {
    "config": "LlamaConfig PretrainedConfig",
    "base_llama": "LlamaConfig LlamaPreTrainedModel",
    "llama": "Attention FeedForward Llama LlamaConfig LlamaLayer LlamaPreTrainedModel RMSNorm "
    "apply_rotary_emb load_pretrained",
    "rope": "apply_rotary_emb reshape_for_broadcast",
    "tokenizer": "TOKENIZER_MODEL Tokenizer",
    "classifier": "LlamaEmbeddingClassifier LlamaZeroShotClassifier Tokenizer load_pretrained",
    "optimizer": "AdamW",
    "prepare_submit": "check_file main",
    "utils": "seed_everything",
    "run_llama": "LlamaDataset TQDM_DISABLE create_data generate_sentence get_args model_eval "
    "save_model seed_everything test test_with_prompting train write_predictions_to_file",
}
SIGNATURES = {
    "llama.Attention.compute_query_key_value_scores": "self query key value",
    "llama.FeedForward.SwiGLU": "self x",
    "llama.FeedForward.__init__": "self dim hidden_dim multiple_of dropout",
    "llama.Llama.forward": "self tokens targets=None",
    "llama.Llama.generate": "self idx max_new_tokens temperature=1.0 top_k=None",
    "llama.LlamaLayer.__init__": "self layer_id config",
    "llama.RMSNorm.__init__": "self dim eps=1e-06",
    "llama.RMSNorm._norm": "self x",
    "llama.load_pretrained": "checkpoint",
    "rope.apply_rotary_emb": "query key head_dim max_seq_len theta=10000.0",
    "rope.reshape_for_broadcast": "freqs_cis x",
    "optimizer.AdamW.__init__": "self params lr=0.001 betas=(0.9,0.999) eps=1e-06 "
    "weight_decay=0.0 correct_bias=True",
    "tokenizer.Tokenizer.__init__": "self max_len=None tokenizer_model=None",
    "tokenizer.Tokenizer.encode": "self s bos eos",
    "classifier.LlamaZeroShotClassifier.__init__": "self config tokenizer label_names",
    "classifier.LlamaEmbeddingClassifier.forward": "self input_ids",
    "run_llama.LlamaDataset.__init__": "self dataset args eos=False",
    "run_llama.create_data": "filename tokenizer flag='train' lower=False eos=True "
    "prompt_suffix=None",
    "run_llama.generate_sentence": "args prefix outfile max_new_tokens=75 temperature=0.0",
    "run_llama.model_eval": "dataloader model device",
    "run_llama.save_model": "model optimizer args config filepath",
    "run_llama.write_predictions_to_file": "split outfile acc pred sents",
}
ATTRIBUTES = {
    "": "config config_class base_model_prefix dtype init_weights params vocab_size n_layers "
    "tok_embeddings dropout layers norm output",
    "layers.0": "n_heads dim head_dim layer_id attention feed_forward attention_norm ffn_norm",
    "layers.0.attention": "n_kv_heads n_local_heads n_local_kv_heads n_rep head_dim max_seq_len "
    "compute_query compute_key compute_value compute_output attn_dropout resid_dropout dropout",
    "layers.0.feed_forward": "w1 w2 w3 dropout",
    "norm": "eps weight",
}


@pytest.mark.parametrize("module", NAMES)
def test_every_name_is_where_the_assignment_has_it(module):
    for name in NAMES[module].split():
        assert hasattr(importlib.import_module(module), name), name


@pytest.mark.parametrize("path", SIGNATURES)
def test_parameters_have_the_assignments_names_order_and_defaults(path):
    module, *names = path.split(".")
    function = importlib.import_module(module)
    for name in names:
        function = getattr(function, name)
    parameters = inspect.signature(function).parameters.values()
    ours = [
        p.name + ("" if p.default is p.empty else f"={p.default!r}")
        for p in parameters
        if p.kind != p.VAR_KEYWORD
    ]
    theirs = SIGNATURES[path].split()
    assert [parameter.replace(" ", "") for parameter in ours[: len(theirs)]] == theirs
    assert all("=" in parameter for parameter in ours[len(theirs) :])


@pytest.mark.parametrize("part", ATTRIBUTES)
def test_parts_of_a_model_have_the_assignments_attributes(part):
    for name in ATTRIBUTES[part].split():
        assert hasattr(make_llama().get_submodule(part), name), name


def test_a_configuration_has_the_assignments_settings():
    config = LlamaConfig(foo=3)
    assert isinstance(config, PretrainedConfig) and config.model_type == "llama"
    assert (config.num_labels, config.position_embedding_type, config.foo) == (2, "rotary", 3)
    assert config.use_cache and config.return_dict and not config.output_attentions
    assert LlamaConfig(num_labels=5).num_labels == 5


def test_init_weights_draws_new_weights():
    llama = make_llama()
    assert llama.dtype == torch.float32 and llama.double().dtype == torch.float64
    llama.init_weights()
    assert 0.015 < llama.layers[0].attention.compute_query.weight.std() < 0.025


def test_attention_drops_weights_with_its_own_dropout():
    attention = make_llama(dropout=0.5).train().layers[0].attention
    ones = torch.ones(1, 4, 6, 8)
    attention.attn_dropout.p = 0.0
    torch.testing.assert_close(attention.compute_query_key_value_scores(ones, ones, ones), ones)


def test_a_table_is_reshaped_to_broadcast():
    table, x = torch.randn(5, 4), torch.randn(2, 5, 3, 4)
    assert torch.equal(rope.reshape_for_broadcast(table, x) * x, table[None, :, None] * x)


def test_a_dataset_pads_on_the_right(project):
    args = SimpleNamespace(max_sentence_len=None)
    dataset = run_llama.LlamaDataset([("a warm film", 2, []), ("a", 0, [])], args)
    token_ids, labels, sents = dataset.pad_data(dataset)
    expected = Tokenizer().encode("a", bos=True, eos=False)
    assert token_ids[1, : len(expected)].tolist() == expected
    assert (token_ids[1, len(expected) :] == Tokenizer().pad_id).all()
    assert labels.tolist() == [2, 0] and sents == ["a warm film", "a"]


def test_the_tokenizer_is_exported_by_its_script(project):
    shutil.copy("tokenizer.model", "t.model")
    command = [sys.executable, ROOT / "tokenizer.py", "-t", "t.model"]
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert (project.path / "t.bin").read_bytes() == Tokenizer().to_llama2c()
    done = subprocess.run([*command[:3], "absent.model"], capture_output=True)
    assert done.returncode == 2 and done.stderr.startswith(b"error: absent.model: no such file")
