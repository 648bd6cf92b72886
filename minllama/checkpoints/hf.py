"""Hugging Face folders: `config.json` with safetensors, whole or in shards, or `pytorch_model.bin`.

Their rotary embedding pairs an element of a head's first half with one of its second half; ours
pairs neighbours. So the rows of query and key change their order on the way in and out.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from config import LlamaConfig
from minllama.checkpoints import hf_tokenizer, layout
from minllama.checkpoints.layout import EMBEDDING, HEAD, Checkpoint
from minllama.checkpoints.pt import read_checkpoint
from minllama.common.errors import InputError, is_out_of_memory, needs_package
from minllama.common.files import (
    atomic_write,
    refuse_lfs_pointer,
    remove_leftovers,
    temporary_path,
)
from minllama.common.progress import progress_bar
from tokenizer import Tokenizer

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
OLD_WEIGHTS, OLD_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
ROTATED = ("compute_query.weight", "compute_key.weight")
NAMES = {  # theirs, and ours
    "model.embed_tokens.weight": EMBEDDING,
    "model.norm.weight": "norm.weight",
    "lm_head.weight": HEAD,
}
LAYER_NAMES = {  # after "model.layers.N." and "layers.N."
    "self_attn.q_proj.weight": "attention.compute_query.weight",
    "self_attn.k_proj.weight": "attention.compute_key.weight",
    "self_attn.v_proj.weight": "attention.compute_value.weight",
    "self_attn.o_proj.weight": "attention.compute_output.weight",
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
}
SETTINGS = {  # of config.json, and ours
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "intermediate_size": "hidden_dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "max_position_embeddings": "max_seq_len",
    "rms_norm_eps": "layer_norm_eps",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
}
EXPECTED: dict[str, Any] = {  # Llama 2's values, if they are there
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "partial_rotary_factor": 1,
}
IGNORED = {  # without effect on the computation here
    "_name_or_path", "transformers_version", "torch_dtype", "dtype", "initializer_range",
    "use_cache", "pretraining_tp", "pad_token_id", "attention_dropout", "max_length", "return_dict",
    "_attn_implementation", "_attn_implementation_autoset", "id2label", "label2id",
    "chunk_size_feed_forward", "is_decoder", "problem_type",
}  # fmt: skip


def recognizes(path: str | Path) -> bool:
    """Whether a path is a folder with a config.json, or a file of weights in one."""
    return folder_of(path) is not None


def folder_of(path: str | Path) -> Path | None:
    """Find the folder of a model from the folder itself or a file of weights in it."""
    path = Path(path)
    if (path / CONFIG).is_file():
        return path
    is_weights = path.suffix == ".safetensors" or path.name in (INDEX, OLD_WEIGHTS, OLD_INDEX)
    return path.parent if is_weights and (path.parent / CONFIG).is_file() else None


def load(path: str | Path) -> Checkpoint:
    """Read a folder, its tensors mapped into memory, or raise an `InputError`."""
    folder = folder_of(path) or Path(path)
    config, tied = read_config(folder / CONFIG)
    names, shapes = tensor_names(config), layout.shapes_of(config)
    half = config.dim // config.n_heads // 2  # of a head
    tensors: dict[str, Any] = {}
    for file in weight_files(folder):
        is_new = file.suffix == ".safetensors"
        content = read_safetensors(file) if is_new else read_checkpoint(file, mapped=True)
        for name, tensor in content.items():
            ours = names.get(name, str(name))
            if layout.is_buffer(ours):
                continue
            if ours in tensors:
                raise InputError(f"{file}: {name} is there twice")
            fits = isinstance(tensor, torch.Tensor) and tensor.shape == shapes.get(ours)
            if fits and ours.endswith(ROTATED):
                tensor = swap_rows(tensor, 2, half)
            tensors[ours] = tensor
    return layout.build_checkpoint(config, tensors, folder, tied)


def read_config(path: Path) -> tuple[LlamaConfig, bool]:
    """Read a config, and whether embedding and head are tied, or raise an `InputError`."""
    values = layout.read_json(path)
    rope = values.pop("rope_parameters", None)
    theta = values.pop("rope_theta", None)
    if isinstance(rope, dict):  # in newer versions
        theta = rope.pop("rope_theta", theta)
        if rope not in ({}, {"rope_type": "default"}):
            raise InputError(f"{path}: rope_parameters {rope} is not Llama 2's")
    tied = values.pop("tie_word_embeddings", False)
    head_dim = values.pop("head_dim", None)
    theta = 10000.0 if theta is None else theta
    arguments = {"causal": True, "n_kv_heads": None, "rope_theta": theta}
    arguments |= {"bos_token_id": 1, "eos_token_id": 2}
    for name, value in values.items():
        is_set = value is not None and value is not False and value not in ([], {})
        if name in SETTINGS and (value is not None or not name.endswith("_token_id")):
            arguments[SETTINGS[name]] = value
        elif is_set and name not in IGNORED and value != EXPECTED.get(name):
            raise InputError(f"{path}: {name} {value!r} is not Llama 2's")
    missing = [name for name, ours in SETTINGS.items() if ours not in arguments]
    if missing:
        raise InputError(f"{path}: {', '.join(missing)} is missing")
    config = layout.config_from(arguments, path)
    if head_dim not in (None, config.dim // config.n_heads):
        raise InputError(f"{path}: head_dim {head_dim} is not hidden_size / num_attention_heads")
    if type(tied) is not bool:
        raise InputError(f"{path}: tie_word_embeddings is {tied!r}, expected true or false")
    return config, tied


def tensor_names(config: LlamaConfig) -> dict[str, str]:
    """The names of all tensors: theirs, and ours."""
    names = dict(NAMES)
    for i in range(config.n_layers):
        for theirs, ours in LAYER_NAMES.items():
            names[f"model.layers.{i}.{theirs}"] = f"layers.{i}.{ours}"
    return names


def weight_files(path: str | Path) -> list[Path]:
    """The files of a folder's tensors; none if the path is not such a folder.

    Raises an `InputError` if one is absent or lies outside the folder.
    """
    folder = folder_of(path)
    if folder is None:
        return []
    found = [file for file in (WEIGHTS, INDEX, OLD_WEIGHTS, OLD_INDEX) if (folder / file).is_file()]
    if not found:
        raise InputError(f"{folder}: no {WEIGHTS} and no {OLD_WEIGHTS} in it")
    if found[0] in (WEIGHTS, OLD_WEIGHTS):
        return [folder / found[0]]
    index = folder / found[0]
    names = layout.read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise InputError(f"{index}: no weight_map of file names")
    files = sorted(set(names.values()))
    for name in files:
        if Path(name).name != name or not (folder / name).is_file():
            raise InputError(f"{index}: names {name!r}, which is not a file beside it; fetch it")
    return [folder / name for name in files]


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a file, mapped into memory."""
    with needs_package(f"reading {path}", "safetensors"):
        from safetensors import SafetensorError, safe_open
    refuse_lfs_pointer(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise InputError(f"{path}: damaged or incomplete: {error}") from error


def swap_rows(weight: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Reorder the rows of each head of query or key, `(n, m)`, to `(m, n)`."""
    return weight.unflatten(0, (-1, n, m)).transpose(1, 2).flatten(0, 2)


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
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def save(checkpoint: Checkpoint, folder: str | Path, tokenizer: Tokenizer | None) -> None:
    """Write the folder of a causal model, with its tokenizer, as Transformers reads it.

    It must be absent or empty, and takes its name once it is complete.
    """
    with needs_package("--to hf", "safetensors"):
        from safetensors.torch import save_file
    folder = Path(folder)
    config, tensors, _ = checkpoint
    tokenizer_files = {} if tokenizer is None else hf_tokenizer.files(tokenizer)
    half = config.dim // config.n_heads // 2
    theirs = {}
    for name, ours in progress_bar(
        tensor_names(config).items(), desc="write", unit=" tensors", delay=1
    ):
        tensor = swap_rows(tensors[ours], half, 2) if ours.endswith(ROTATED) else tensors[ours]
        theirs[name] = tensor.contiguous()
    if config.tie_embeddings:
        del theirs["lm_head.weight"]
    elif tensors[HEAD].data_ptr() == tensors[EMBEDDING].data_ptr():  # safetensors refuses that
        theirs["lm_head.weight"] = tensors[HEAD].clone()
    remove_leftovers(folder)
    temporary = temporary_path(folder)
    temporary.mkdir()
    try:
        write_json(temporary / CONFIG, config_json(config, tensors[EMBEDDING].dtype))
        stop_ids = {"bos_token_id": config.bos_token_id, "eos_token_id": [*config.stop_ids[::-1]]}
        write_json(temporary / "generation_config.json", stop_ids)
        save_file(theirs, temporary / WEIGHTS, metadata={"format": "pt"})
        if tokenizer is not None:
            shutil.copyfile(tokenizer.model_path, temporary / "tokenizer.model")
            for name, value in tokenizer_files.items():
                write_json(temporary / name, value)
        if folder.is_dir():
            folder.rmdir()  # it is empty
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_json(path: Path, value: dict[str, Any]) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=2) + "\n")
