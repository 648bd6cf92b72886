"""Training of a SentencePiece tokenizer on plain text."""

import io
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import sentencepiece

from minllama.common.errors import InputError
from minllama.common.files import atomic_write

MAX_LINE = 4000  # characters
SAMPLE = 250_000  # lines


class VocabSizeTooSmall(InputError):
    """The vocabulary has fewer pieces than the text has characters."""


def train_tokenizer(
    read_texts: Callable[[], Iterable[str]], vocab_size: int, path: str | Path
) -> None:
    """Train a SentencePiece BPE model like Llama's: single digits, bytes for unknown characters.

    It learns from the lines of the texts, cut to `MAX_LINE` characters, and from a random `SAMPLE`
    of them if there are more. If `vocab_size` has no room for the 256 bytes, it warns, reads the
    texts again and leaves the bytes out: unknown characters are then `<unk>`, id 0; so is padding.

    Raises:
        InputError: the vocabulary is too large or too small for the text.
    """
    sentencepiece.set_random_generator_seed(0)  # of the sample
    try:
        model = _train(read_texts(), vocab_size, byte_fallback=True)
    except VocabSizeTooSmall:
        model = _train(read_texts(), vocab_size, byte_fallback=False)
        warnings.warn(
            f"{vocab_size} pieces have no room for bytes: characters that the training split "
            "does not have become <unk> (id 0), and padding is <unk> too",
            stacklevel=2,
        )
    with atomic_write(path, "wb") as file:
        file.write(model)


def _train(texts: Iterable[str], vocab_size: int, byte_fallback: bool) -> bytes:
    """Train a model, and return it serialized."""
    model, reading_errors = io.BytesIO(), []

    def lines() -> Iterator[str]:
        try:
            for text in texts:
                # The trainer would drop every line with its mark of unknown characters.
                for line in text.replace("\u2585", " ").split("\n"):
                    yield from (line[i : i + MAX_LINE] for i in range(0, len(line), MAX_LINE))
        except Exception as error:  # SentencePiece would hide it in a RuntimeError
            reading_errors.append(error)
            raise

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(),
            input_sentence_size=SAMPLE,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=byte_fallback,
            character_coverage=0.9995 if byte_fallback else 1.0,
            user_defined_symbols=[] if byte_fallback else ["\n"],  # else it is the byte 10
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=True,
            max_sentence_length=4 * MAX_LINE,  # bytes
            minloglevel=2,
        )
    except RuntimeError as error:
        if reading_errors:
            raise reading_errors[0] from None
        failure, flag = str(error), f"--vocab_size {vocab_size}: the text"
        if found := re.search(r"required_chars. \d+ vs (\d+)", failure):
            raise VocabSizeTooSmall(f"{flag} needs at least {found[1]}") from error
        if found := re.search(r"too high \(\d+\).* value <= (\d+)", failure):
            raise InputError(f"{flag} allows at most {found[1]}") from error
        raise InputError(f"{flag} is too short for a tokenizer of that size") from error
    return model.getvalue()
