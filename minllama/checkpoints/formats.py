"""Which format a path has, and reading it."""

from pathlib import Path

from minllama.checkpoints import hf, integrity, llama2c, meta, pt
from minllama.checkpoints.layout import Checkpoint
from minllama.common.errors import InputError, missing_file

FORMATS = (hf, meta, llama2c, pt)  # told apart by content; the last takes what no other does


def load(path: str | Path) -> Checkpoint:
    """Read a model in any format.

    Weights of Hugging Face, Meta and llama2.c are causal; those of a `.pt` are as it says.

    Raises:
        FileNotFoundError: there is nothing.
        InputError: it is no Llama 2, or it is damaged; the message says where.
    """
    if not Path(path).exists():
        raise missing_file(path)
    for form in FORMATS:
        if form.reads(path):
            return form.load(path)
    raise InputError(
        f"{path}: a folder without config.json or params.json; name a file or folder of weights"
    )


def verify(path: str | Path) -> None:
    """Compare a checkpoint with its checksums, as large as it may be.

    Up to 1 GB `load` does it unasked.

    Raises:
        FileNotFoundError: there is nothing.
        InputError: it is damaged, or in a format without checksums.
    """
    if not Path(path).exists():
        raise missing_file(path)
    form = next((form for form in FORMATS if form.reads(path)), None)
    files = [] if form is None else form.files_with_sums(path)
    if not files:
        raise InputError(f"--verify: {path} carries no checksums; leave it out")
    for file in files:
        integrity.check(file, verify=True)


def tokenizer_beside(path: str | Path) -> Path | None:
    """The SentencePiece model that comes with a checkpoint: in its folder, or in Meta's above it.

    Raises:
        InputError: there is a tokenizer in a form that cannot be read.
    """
    folder = hf.folder_of(path) or meta.folder_of(path) or Path(path).parent
    places = [folder]
    if meta.reads(path):
        places.append(folder.parent)
    for place in places:
        if (place / "tokenizer.model").is_file():
            return place / "tokenizer.model"
    if hf.reads(path) and (folder / "tokenizer.json").is_file():
        raise InputError(
            f"{folder}: has only a tokenizer.json; put the model's tokenizer.model beside it, or "
            "name it with --tokenizer-path"
        )
    return None


def find_tokenizer(checkpoint: str | Path) -> str:
    """The tokenizer beside a checkpoint, or else the one in the working folder."""
    return str(tokenizer_beside(checkpoint) or "tokenizer.model")
