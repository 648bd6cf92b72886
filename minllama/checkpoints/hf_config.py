"""Hugging Face's `config.json`, to a config of ours and back."""

from pathlib import Path
from typing import Any

import torch

from config import LlamaConfig
from minllama.checkpoints.layout import config_from, read_json
from minllama.common.errors import InputError

SETTINGS = {  # of config.json, and ours
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "intermediate_size": "hidden_dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "max_position_embeddings": "max_seq_len",
    "rms_norm_eps": "layer_norm_eps",
}
ALLOWED: dict[str, list[Any]] = {  # the values that Llama 2 may have; all may be unset
    "model_type": ["llama"],
    "architectures": [["LlamaForCausalLM"]],
    "hidden_act": ["silu"],
    "bos_token_id": [1],
    "eos_token_id": [2],
    "partial_rotary_factor": [1],
    "rope_scaling": [],
    "attention_bias": [],
    "mlp_bias": [],
    "sliding_window": [],
    "quantization_config": [],
}
IGNORED = {  # without effect on the computation here
    "_name_or_path", "transformers_version", "torch_dtype", "dtype", "initializer_range",
    "use_cache", "pretraining_tp", "pad_token_id", "attention_dropout", "max_length", "return_dict",
    "_attn_implementation", "_attn_implementation_autoset", "id2label", "label2id",
    "chunk_size_feed_forward", "is_decoder", "problem_type",
}  # fmt: skip


def read_config(path: Path) -> tuple[LlamaConfig, bool]:
    """Read the configuration, and whether embedding and head are tied.

    Raises:
        InputError: a setting is not Llama 2's; the message names it.
    """
    values = read_json(path)
    rope = values.pop("rope_parameters", None)
    if isinstance(rope, dict):  # in newer versions
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        if scaling not in ({}, {"rope_type": "default"}):
            raise InputError(f"{path}: rope_parameters {rope} is not Llama 2's")
        values |= {"rope_theta": rope.get("rope_theta", values.get("rope_theta"))}
    theta = values.pop("rope_theta", None)
    tied = values.pop("tie_word_embeddings", False)
    head_dim = values.pop("head_dim", None)
    arguments: dict[str, Any] = {"causal": True, "n_kv_heads": None}
    arguments["rope_theta"] = 10000.0 if theta is None else theta
    for name, value in values.items():
        is_set = value is not None and value is not False and value not in ([], {})
        if name in SETTINGS:
            arguments[SETTINGS[name]] = value
        elif is_set and name in ALLOWED and value not in ALLOWED[name]:
            raise InputError(f"{path}: {name} {value!r} is not Llama 2's")
        elif is_set and name not in ALLOWED and name not in IGNORED:
            raise InputError(f"{path}: {name} is not supported")
    missing = [name for name, ours in SETTINGS.items() if ours not in arguments]
    if missing:
        raise InputError(f"{path}: {', '.join(missing)} is missing")
    config = config_from(arguments, path)
    if head_dim not in (None, config.dim // config.n_heads):
        raise InputError(f"{path}: head_dim {head_dim} is not hidden_size / num_attention_heads")
    if type(tied) is not bool:
        raise InputError(f"{path}: tie_word_embeddings is {tied!r}, expected true or false")
    return config, tied


def config_json(config: LlamaConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The content of `config.json`."""
    values = {theirs: getattr(config, ours) for theirs, ours in SETTINGS.items()}
    return values | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "intermediate_size": config.ffn_dim,
        "num_key_value_heads": config.n_kv_heads or config.n_heads,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "pretraining_tp": 1,
        "use_cache": True,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
