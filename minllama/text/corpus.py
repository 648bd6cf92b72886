"""The text of a pre-training run: its tokenizer, and the token ids of its splits."""

from collections.abc import Sequence
from pathlib import Path

from minllama.common.errors import InputError
from minllama.common.files import atomic_write
from minllama.text.documents import Corpus
from minllama.text.token_files import SUFFIX, open_token_files
from minllama.text.tokenized import TokenizedText, tokenize
from minllama.text.tokenizer_training import train_tokenizer
from tokenizer import Tokenizer


def holds_token_ids(paths: Sequence[str]) -> bool:
    """Whether the files hold token ids rather than text."""
    return any(Path(path).suffix == SUFFIX for path in paths)


def prepare_corpus(
    paths: Sequence[str],
    shares: Sequence[float],
    vocab_size: int,
    given: Tokenizer | None,
    tokenizer_path: Path,
    tokens_folder: Path,
) -> tuple[Tokenizer, dict[str, TokenizedText]]:
    """Train or copy the tokenizer and tokenize the text, unless an earlier run has left them.

    Args:
        given: the tokenizer to copy; None trains one of `vocab_size` pieces on the training split.

    Returns:
        the tokenizer, and the splits by name.
    """
    corpus = Corpus(paths, shares)
    if given is None and not tokenizer_path.is_file():
        train_tokenizer(corpus.training_texts, vocab_size, tokenizer_path)
    elif given is not None and not tokenizer_path.is_file():
        with atomic_write(tokenizer_path, "wb") as file:
            file.write(given.model_path.read_bytes())
    tokenizer = Tokenizer(tokenizer_model=tokenizer_path)
    if holds_token_ids(paths):
        return tokenizer, open_token_files(paths, shares, tokenizer)
    return tokenizer, tokenize(corpus, tokenizer, tokens_folder)


def check_token_files(paths: Sequence[str], tokenizer_path: str | None, tokens: Path) -> None:
    """Check that files of token ids stand alone and come with their tokenizer.

    Args:
        tokens: the folder of the run's own token files, which must not be read as a text.

    Raises:
        InputError: they do not.
    """
    if not holds_token_ids(paths):
        return
    texts = [path for path in paths if Path(path).suffix != SUFFIX]
    if texts:
        raise InputError(
            f"--text {texts[0]}: stands among files of token ids ({SUFFIX}); give either only "
            "texts or only token ids"
        )
    if tokenizer_path is None:
        raise InputError(
            f"--text {paths[0]}: token ids need the tokenizer that made them; name it with "
            "--tokenizer-path"
        )
    if any(Path(path).resolve().parent == tokens.resolve() for path in paths):
        raise InputError(
            f"--text {paths[0]}: a file of the run in {tokens.parent}; name another --output_dir"
        )
