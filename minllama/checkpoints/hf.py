"""Hugging Face folders: `config.json` with safetensors, whole or in shards, or `pytorch_model.bin`.

Their rotary embedding pairs an element of a head's first half with one of its second half; ours
pairs neighbours. So the rows of query and key change their order on the way in and out.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from config import LlamaConfig
from minllama.checkpoints import layout
from minllama.checkpoints.hf_config import config_json, read_config
from minllama.checkpoints.layout import EMBEDDING, HEAD, Checkpoint
from minllama.checkpoints.pt import read_checkpoint
from minllama.common.errors import InputError, is_out_of_memory
from minllama.common.files import atomic_write
from minllama.common.progress import Bar

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
OLD_WEIGHTS, OLD_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
ROPE_FREQUENCIES = "rotary_emb.inv_freq"  # in old files; computed from theta here
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


def reads(path: str | Path) -> bool:
    """Whether a path is such a folder, or a file of weights in one."""
    return folder_of(path) is not None


def folder_of(path: str | Path) -> Path | None:
    """The folder of a model, given itself or one of its files of weights."""
    path = Path(path)
    if (path / CONFIG).is_file():
        return path
    is_weights = path.suffix == ".safetensors" or path.name in (INDEX, OLD_WEIGHTS, OLD_INDEX)
    return path.parent if is_weights and (path.parent / CONFIG).is_file() else None


def load(path: str | Path) -> Checkpoint:
    """Read a folder.

    Raises:
        InputError: it does not hold a Llama 2, or it is damaged; the message says where.
    """
    folder = folder_of(path)
    if folder is None:
        raise InputError(f"{path}: no {CONFIG} in it")
    config, tied = read_config(folder / CONFIG)
    tensors = read_tensors(folder, tensor_names(config))
    shapes = layout.shapes_of(config)
    for name, tensor in tensors.items():
        if is_rotated(name) and tuple(tensor.shape) == shapes.get(name):
            tensors[name] = to_neighbours(tensor, config)
    return layout.checked(config, tensors, folder, tied)


def tensor_names(config: LlamaConfig) -> dict[str, str]:
    """The name of every tensor in such a folder, and ours."""
    names = dict(NAMES)
    for i in range(config.n_layers):
        for theirs, ours in LAYER_NAMES.items():
            names[f"model.layers.{i}.{theirs}"] = f"layers.{i}.{ours}"
    return names


def read_tensors(folder: Path, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """Read all tensors of a folder, by this project's names, mapped into memory.

    Raises:
        InputError: a file is absent, damaged or outside the folder, or a tensor is there twice.
    """
    tensors: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        is_new = file.suffix == ".safetensors"
        read = read_safetensors(file) if is_new else read_checkpoint(file, mapped=True)
        for name, tensor in read.items():
            if str(name).endswith(ROPE_FREQUENCIES):
                continue
            if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
                raise InputError(
                    f"{file}: {name} is not a tensor of floating-point numbers, as in quantized "
                    "models; take one in float32, bfloat16 or float16"
                )
            ours = names.get(name, str(name))
            if ours in tensors:
                raise InputError(f"{file}: {name} is there twice")
            tensors[ours] = tensor
    return tensors


def weight_files(path: str | Path) -> list[Path]:
    """The files of a folder's tensors; none if the path is not such a folder.

    Raises:
        InputError: one is absent.
    """
    folder = folder_of(path)
    if folder is None:
        return []
    for whole, index in ((WEIGHTS, INDEX), (OLD_WEIGHTS, OLD_INDEX)):
        if (folder / whole).is_file():
            return [folder / whole]
        if (folder / index).is_file():
            return indexed_files(folder / index)
    raise InputError(f"{folder}: no {WEIGHTS} and no {OLD_WEIGHTS} in it")


def indexed_files(index: Path) -> list[Path]:
    """The files that an index names, each once; they must be in its own folder."""
    names = layout.read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise InputError(f"{index}: no weight_map of file names")
    files = sorted(set(names.values()))
    for name in files:
        if Path(name).name != name or name in ("", ".", ".."):
            raise InputError(f"{index}: names {name!r}, which is not a file of the folder")
        if not (index.parent / name).is_file():
            raise InputError(f"{index}: names {name}, which is not here; fetch it too")
    return [index.parent / name for name in files]


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a file, mapped into memory."""
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


def is_rotated(name: str) -> bool:
    """Whether a tensor makes queries or keys."""
    return name.endswith(("compute_query.weight", "compute_key.weight"))


def to_neighbours(weight: torch.Tensor, config: LlamaConfig) -> torch.Tensor:
    """Reorder rows of query or key, `(heads · head_dim, dim)`, to pairs of neighbours."""
    head_dim = config.dim // config.n_heads
    return weight.view(-1, 2, head_dim // 2, config.dim).transpose(1, 2).reshape(weight.shape)


def to_halves(weight: torch.Tensor, config: LlamaConfig) -> torch.Tensor:
    """Reorder rows of query or key to pairs of one row in each half of a head."""
    head_dim = config.dim // config.n_heads
    return weight.view(-1, head_dim // 2, 2, config.dim).transpose(1, 2).reshape(weight.shape)


def save(checkpoint: Checkpoint, folder: str | Path, tokenizer: Path | None) -> None:
    """Write a folder that Transformers' `from_pretrained` reads.

    Args:
        checkpoint: of a causal model.
        folder: takes its name once it is complete; it must be absent or empty.
        tokenizer: the SentencePiece model to copy into it.

    Raises:
        InputError: safetensors is not installed.
    """
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise InputError("--to hf needs a package: pip install safetensors") from None
    folder = Path(folder)
    config, tensors, _ = checkpoint
    theirs = {}
    for name, ours in Bar(tensor_names(config).items(), desc="write", unit=" tensors", delay=1):
        if ours != HEAD or not config.tie_embeddings:
            tensor = to_halves(tensors[ours], config) if is_rotated(ours) else tensors[ours]
            theirs[name] = tensor.contiguous()
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        write_json(temporary / CONFIG, config_json(config, tensors[EMBEDDING].dtype))
        ids = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2}
        write_json(temporary / "generation_config.json", ids)
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


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write an object as indented JSON."""
    with atomic_write(path) as file:
        json.dump(value, file, indent=2)
        file.write("\n")
