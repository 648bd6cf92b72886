"""Find the format of a checkpoint, and read it."""

from pathlib import Path

from minllama.checkpoints import hf, llama2c, meta, pt
from minllama.checkpoints.layout import Checkpoint
from minllama.common.errors import InputError, missing_file

FORMATS = (hf, meta, llama2c, pt)  # recognized by their content; the last accepts any file


def load(path: str | Path) -> Checkpoint:
    """Read a model in any format. A `.pt` says whether it is causal; the others always are.

    Raises:
        FileNotFoundError: the path does not exist.
        InputError: it does not hold a Llama 2, or it is damaged; the message says where.
    """
    if not Path(path).exists():
        raise missing_file(path)
    for fmt in FORMATS:
        if fmt.recognizes(path):
            return fmt.load(path)
    raise InputError(
        f"{path}: a folder without config.json or params.json; name a file or folder of weights"
    )


def tokenizer_beside(path: str | Path) -> Path | None:
    """Find the SentencePiece model of a checkpoint: in its folder, or in the one above Meta's.

    Raises an `InputError` if the folder has only a `tokenizer.json`.
    """
    shards = meta.shards_of(path)
    folder = hf.folder_of(path) or (shards[0] if shards else Path(path)).parent
    places = [folder, folder.parent] if shards else [folder]
    for place in places:
        if (place / "tokenizer.model").is_file():
            return place / "tokenizer.model"
    if hf.recognizes(path) and (folder / "tokenizer.json").is_file():
        raise InputError(
            f"{folder}: has only a tokenizer.json; add tokenizer.model or --tokenizer-path"
        )
    return None


def find_tokenizer(checkpoint: str | Path) -> str:
    """The tokenizer beside a checkpoint, or else the one in the working folder."""
    return str(tokenizer_beside(checkpoint) or "tokenizer.model")
