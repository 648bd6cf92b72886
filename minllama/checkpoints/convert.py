"""Convert weights from one format to another.

    .venv/bin/python -m minllama.checkpoints.convert IN OUT --to pt|llama2c|hf [--dtype DTYPE]

IN is a file or a folder in any format. OUT takes its name once it is complete. The tokenizer beside
IN goes with it: into the folder for hf, beside OUT for pt, and for llama2c as `tokenizer.bin`.
"""

from argparse import BooleanOptionalAction
from pathlib import Path

import torch

from minllama.checkpoints import hf, llama2c, pt
from minllama.checkpoints.formats import load, tokenizer_beside
from minllama.checkpoints.layout import EMBEDDING, HEAD, Checkpoint
from minllama.common.errors import InputError
from minllama.common.files import atomic_write, check_outputs, identity
from minllama.common.program import run_script, script_parser
from tokenizer import TOKENIZER_MODEL, Tokenizer, check_vocabulary

FLOATS = ("float32", "bfloat16", "float16")
DTYPES = {"pt": FLOATS, "hf": FLOATS, "llama2c": ("float32", "int8")}  # by format


def convert(
    source: str,
    target: str,
    to: str,
    dtype: str | None = None,
    causal: bool | None = None,
    tokenizer_path: str | Path | None = None,
) -> None:
    """Read a checkpoint and write it in the format `to`, a key of `DTYPES`.

    Args:
        causal: overrides the checkpoint's.
        tokenizer_path: None takes the tokenizer beside the checkpoint.

    Raises:
        InputError: the format cannot express the model, or something would be overwritten.
    """
    if dtype is not None and dtype not in DTYPES[to]:
        raise InputError(f"--dtype {dtype}: --to {to} has {', '.join(DTYPES[to])}")
    path = tokenizer_path or tokenizer_beside(source)
    if to == "hf":
        check_new_folder(Path(target))
    else:
        check_outputs([target], [source] if path is None else [source, path])
    tokenizer = None if path is None else Tokenizer(tokenizer_model=path)
    tokenizer_files = tokenizer_for(target, to, tokenizer)
    checkpoint = load(source)
    config = checkpoint.config
    config.causal = config.causal if causal is None else causal
    if tokenizer is not None:
        check_vocabulary(tokenizer, config, source)
        config.bos_token_id, config.eos_token_id = tokenizer.bos_id, tokenizer.eos_id
    if to != "pt" and not config.causal:
        raise InputError(
            f"{source}: attends without a mask, which --to {to} cannot express; if it was trained "
            "with one, as stories42M.pt, add --causal"
        )
    write(checkpoint, target, to, dtype, tokenizer)
    write_files(tokenizer_files)


def write(
    checkpoint: Checkpoint, target: str, to: str, dtype: str | None, tokenizer: Tokenizer | None
) -> None:
    """Write a checkpoint in a format and a precision."""
    if to == "llama2c":
        if tokenizer is not None:
            checkpoint = llama2c.in_order(checkpoint, tokenizer.llama2c_order())
        llama2c.save(checkpoint, target, version=2 if dtype == "int8" else 0)
        return
    if dtype is not None:
        checkpoint = in_dtype(checkpoint, getattr(torch, dtype))
    if to == "pt":
        pt.save(checkpoint, target)
    else:
        hf.save(checkpoint, target, tokenizer)


def check_new_folder(path: Path) -> None:
    """Check that a folder is empty, or that it can be made."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{path}: already exists; name a new or an empty folder")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path}: the folder {path.parent} does not exist; make it first")


def tokenizer_for(target: str, to: str, tokenizer: Tokenizer | None) -> dict[Path, bytes]:
    """The tokenizer files to write beside the target, with their content, unless they are there."""
    if tokenizer is None or to == "hf":
        return {}
    model, folder = tokenizer.model_path.read_bytes(), Path(target).parent
    if to == "pt":
        files = {folder / TOKENIZER_MODEL: model}
    else:
        files = {folder / "tokenizer.bin": tokenizer.to_llama2c()}
        order = tokenizer.llama2c_order()
        if order != list(range(tokenizer.n_words)):
            files[folder / TOKENIZER_MODEL] = llama2c.reorder_pieces(model, order)
    for path, content in files.items():
        if identity(path) == identity(target):
            raise InputError(f"{target}: the tokenizer takes this name; choose another")
        if path.exists() and not (path.is_file() and path.read_bytes() == content):
            raise InputError(
                f"{path}: another tokenizer than {target} needs with --to {to}; name a file in "
                "another folder"
            )
    return {path: content for path, content in files.items() if not path.exists()}


def write_files(contents: dict[Path, bytes]) -> None:
    for path, content in contents.items():
        with atomic_write(path, "wb") as file:
            file.write(content)


def in_dtype(checkpoint: Checkpoint, dtype: torch.dtype) -> Checkpoint:
    """The checkpoint in another precision, or an `InputError` if that cannot hold a value."""
    tensors = {}
    for name, tensor in checkpoint.tensors.items():
        tensors[name] = tensor.to(dtype)
        if not tensors[name].isfinite().all():
            raise InputError(f"{checkpoint.source}: {name} has values too large for {dtype}")
    if checkpoint.config.tie_embeddings:
        tensors[EMBEDDING] = tensors[HEAD]
    return checkpoint._replace(tensors=tensors)


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("source", metavar="IN", help="a file or a folder in any format")
    parser.add_argument("target", metavar="OUT", help="the file to write, or the folder for hf")
    parser.add_argument("--to", choices=tuple(DTYPES), required=True, help="format of OUT")
    dtypes = (*FLOATS, "int8")
    parser.add_argument("--dtype", choices=dtypes, help="precision of the weights, by default IN's")
    parser.add_argument(
        "--causal", action=BooleanOptionalAction, help="mask later positions, by default as IN says"
    )
    parser.add_argument("--tokenizer-path", help="by default tokenizer.model beside IN")
    args = parser.parse_args()
    convert(**vars(args))
    print(f"wrote {args.target}")


if __name__ == "__main__":
    run_script(main)
