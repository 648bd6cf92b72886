"""Hugging Face folders: `config.json` with safetensors, whole or in shards, or `pytorch_model.bin`.

Their rotary embedding pairs an element of a head's first half with one of its second half, ours
pairs neighbours. So the rows of query and key are put in another order on the way in and out.
"""

import json
import os
import re
import shutil
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from config import LlamaConfig
from minllama.checkpoints.integrity import is_zip
from minllama.checkpoints.layout import (
    EMBEDDING,
    HEAD,
    Checkpoint,
    checked,
    read_json,
    see_layers,
    shapes_of,
)
from minllama.checkpoints.pt import read_checkpoint
from minllama.common.errors import InputError, is_out_of_memory
from minllama.common.files import atomic_write
from minllama.common.progress import Bar

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
OLD_WEIGHTS, OLD_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
ROPE_FREQUENCIES = "rotary_emb.inv_freq"  # in old files; computed from theta here

NAMES = MappingProxyType(
    {
        "model.embed_tokens.weight": EMBEDDING,
        "model.norm.weight": "norm.weight",
        "lm_head.weight": HEAD,
    }
)
LAYER_NAMES = MappingProxyType(  # behind "model.layers.N." and "layers.N."
    {
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
)
SIZES = MappingProxyType(  # of config.json, and ours
    {
        "vocab_size": "vocab_size",
        "hidden_size": "dim",
        "intermediate_size": "hidden_dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "max_position_embeddings": "max_seq_len",
        "rms_norm_eps": "layer_norm_eps",
    }
)
ONLY = MappingProxyType(  # what Llama 2 has; anything else is another model
    {
        "model_type": ("llama",),
        "architectures": (["LlamaForCausalLM"],),
        "hidden_act": ("silu",),
        "bos_token_id": (1,),
        "eos_token_id": (2,),
        "rope_scaling": (),
        "attention_bias": (),
        "mlp_bias": (),
        "sliding_window": (),
        "quantization_config": (),
        "partial_rotary_factor": (1, 1.0),
    }
)
WITHOUT_EFFECT = frozenset(  # on what the model computes here
    {
        *("_name_or_path", "transformers_version", "torch_dtype", "dtype", "initializer_range"),
        *("use_cache", "pretraining_tp", "pad_token_id", "attention_dropout", "max_length"),
        *("_attn_implementation", "_attn_implementation_autoset", "return_dict", "id2label"),
        *("label2id", "chunk_size_feed_forward", "is_decoder", "problem_type"),
    }
)


def reads(path: str | Path) -> bool:
    """Whether a path is such a folder, or a file of weights in one."""
    return folder_of(path) is not None


def folder_of(path: str | Path) -> Path | None:
    """The folder of a model, also where one of its files of weights was named."""
    path = Path(path)
    if (path / CONFIG).is_file():
        return path
    is_weights = path.suffix == ".safetensors" or path.name in (INDEX, OLD_WEIGHTS, OLD_INDEX)
    return path.parent if is_weights and (path.parent / CONFIG).is_file() else None


def load(path: str | Path) -> Checkpoint:
    """Read a folder.

    Raises:
        InputError: it is no Llama 2, or it is damaged; the message says where.
    """
    folder = folder_of(path)
    if folder is None:
        raise InputError(f"{path}: no {CONFIG} in it")
    config, tied = read_config(folder / CONFIG)
    tensors = {}
    for name, tensor in read_tensors(folder).items():
        if name.endswith(ROPE_FREQUENCIES):
            continue
        if not tensor.is_floating_point():
            raise InputError(
                f"{folder}: {name} has numbers of type {tensor.dtype}, as quantized models have; "
                "take one in float32, bfloat16 or float16"
            )
        ours = our_name(name)
        if ours in tensors:
            raise InputError(f"{folder}: {name} is there twice")
        tensors[ours] = tensor
    see_layers(config, len(tensors), folder)
    expected = shapes_of(config)
    for name, tensor in tensors.items():
        if is_rotated(name) and tuple(tensor.shape) == expected.get(name):
            tensors[name] = to_neighbours(tensor, config)
    return checked(config, tensors, folder, tied)


def our_name(name: str) -> str:
    """This repository's name of a tensor; one that is unknown stays as it is."""
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    if found and found[2] in LAYER_NAMES:
        return f"layers.{found[1]}.{LAYER_NAMES[found[2]]}"
    return NAMES.get(name, name)


def is_rotated(name: str) -> bool:
    return name.endswith(("compute_query.weight", "compute_key.weight"))


def to_neighbours(weight: torch.Tensor, config: LlamaConfig) -> torch.Tensor:
    """Rows of query or key, `(heads · head_dim, dim)`, from halves that pair to neighbours."""
    head_dim = config.dim // config.n_heads
    return weight.view(-1, 2, head_dim // 2, config.dim).transpose(1, 2).reshape(weight.shape)


def to_halves(weight: torch.Tensor, config: LlamaConfig) -> torch.Tensor:
    """The opposite of `to_neighbours`."""
    head_dim = config.dim // config.n_heads
    return weight.view(-1, head_dim // 2, 2, config.dim).transpose(1, 2).reshape(weight.shape)


def is_unset(value: Any) -> bool:
    """Whether a setting is null, false or empty. 0 is a value: a token's id may be 0."""
    return value is None or value is False or value in ([], {})


def read_config(path: Path) -> tuple[LlamaConfig, bool]:
    """The configuration, and whether embedding and head are tied.

    Raises:
        InputError: something in it is not Llama 2's; it is named.
    """
    values = read_json(path)
    arguments: dict[str, Any] = {"causal": True, "rope_theta": 10000.0, "n_kv_heads": None}
    rope = values.pop("rope_parameters", None)
    if isinstance(rope, dict):  # of newer versions
        values |= {"rope_theta": rope.get("rope_theta", values.get("rope_theta"))}
        more = {name: x for name, x in rope.items() if name not in ("rope_theta", "rope_type")}
        if more or rope.get("rope_type", "default") != "default":
            raise InputError(f"{path}: rope_parameters {rope} is not Llama 2's")
    tied = values.pop("tie_word_embeddings", False)
    head_dim = values.pop("head_dim", None)
    for name, value in values.items():
        if name in SIZES:
            arguments[SIZES[name]] = value
        elif name == "rope_theta":
            arguments["rope_theta"] = 10000.0 if value is None else value
        elif name in ONLY:
            if not is_unset(value) and value not in ONLY[name]:
                raise InputError(f"{path}: {name} {value!r} is not Llama 2's")
        elif name not in WITHOUT_EFFECT and not is_unset(value):
            raise InputError(f"{path}: {name} is not understood")
    missing = [name for name, ours in SIZES.items() if ours not in arguments]
    if missing:
        raise InputError(f"{path}: {', '.join(missing)} is missing")
    try:
        config = LlamaConfig.from_model_args(arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: describes no Llama: {error}") from error
    if head_dim not in (None, config.dim // config.n_heads):
        raise InputError(f"{path}: head_dim {head_dim} is not hidden_size / num_attention_heads")
    if type(tied) is not bool:
        raise InputError(f"{path}: tie_word_embeddings is {tied!r}, expected true or false")
    return config, tied


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder by their names there, mapped into memory.

    Raises:
        InputError: a file is absent, damaged or outside the folder, or a tensor is there twice.
    """
    tensors: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        is_new = file.suffix == ".safetensors"
        read = read_safetensors(file) if is_new else read_checkpoint(file, mapped=True)
        for name, tensor in read.items():
            if name in tensors:
                raise InputError(f"{file}: {name} is in another file too")
            if not isinstance(tensor, torch.Tensor):
                raise InputError(f"{file}: {name} is no tensor")
            tensors[name] = tensor
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder's tensors.

    Raises:
        InputError: one is absent.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        return indexed_files(folder / INDEX)
    if (folder / OLD_WEIGHTS).is_file():
        return [folder / OLD_WEIGHTS]
    if (folder / OLD_INDEX).is_file():
        return indexed_files(folder / OLD_INDEX)
    raise InputError(f"{folder}: no {WEIGHTS} and no {OLD_WEIGHTS} in it")


def files_with_sums(path: str | Path) -> list[Path]:
    """The files that carry checksums: those of `torch.save`, and no safetensors."""
    return [file for file in weight_files(folder_of(path)) if is_zip(file)]


def indexed_files(index: Path) -> list[Path]:
    """The files that an index names, each once.

    Raises:
        InputError: one is absent, or not in the folder of the index.
    """
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise InputError(f"{index}: no weight_map of file names")
    files = []
    for name in sorted(set(names.values())):
        if Path(name).name != name or name in ("", ".", ".."):
            raise InputError(f"{index}: names {name!r}, which is not a file of the folder")
        if not (index.parent / name).is_file():
            raise InputError(f"{index}: names {name}, which is not here; fetch it too")
        files.append(index.parent / name)
    return files


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, mapped into memory."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise InputError(f"{path}: reading it needs a package: pip install safetensors") from None
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise InputError(f"{path}: damaged or incomplete: {error}") from error


def save(checkpoint: Checkpoint, folder: str | Path, tokenizer: Path | None) -> None:
    """Write a folder that Transformers' `from_pretrained` takes.

    Args:
        checkpoint: of a causal model.
        folder: takes its name when it is whole; there must be none, or an empty one.
        tokenizer: the SentencePiece model to put beside it.

    Raises:
        InputError: safetensors is not installed.
    """
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise InputError("--to hf needs a package: pip install safetensors") from None
    folder = Path(folder)
    config, tensors, _ = checkpoint
    dtype = tensors[EMBEDDING].dtype
    theirs = {}
    progress = {"desc": "write", "unit": " tensors", "delay": 1}
    for name, tensor in Bar(tensors.items(), **progress):
        if name == HEAD and config.tie_embeddings:
            continue
        tensor = to_halves(tensor, config) if is_rotated(name) else tensor
        theirs[their_name(name)] = tensor.contiguous()
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        write_json(temporary / CONFIG, config_json(config, dtype))
        ids = {"bos_token_id": 1, "eos_token_id": 2}
        write_json(temporary / "generation_config.json", {"_from_model_config": True} | ids)
        save_file(theirs, temporary / WEIGHTS, metadata={"format": "pt"})
        if tokenizer is not None:
            shutil.copyfile(tokenizer, temporary / "tokenizer.model")
            write_json(temporary / "tokenizer_config.json", TOKENIZER_CONFIG)
        if folder.is_dir():
            folder.rmdir()  # it is empty
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


TOKENIZER_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
    "legacy": True,
}


def their_name(name: str) -> str:
    """The name of one of our tensors there."""
    found = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    if found:
        layer_names = {ours: theirs for theirs, ours in LAYER_NAMES.items()}
        return f"model.layers.{found[1]}.{layer_names[found[2]]}"
    return {ours: theirs for theirs, ours in NAMES.items()}[name]


def config_json(config: LlamaConfig, dtype: torch.dtype) -> dict[str, Any]:
    """What `config.json` is to say."""
    values = {theirs: getattr(config, ours) for theirs, ours in SIZES.items()}
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


def write_json(path: Path, value: dict[str, Any]) -> None:
    with atomic_write(path) as file:
        json.dump(value, file, indent=2)
        file.write("\n")
