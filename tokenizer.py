"""The SentencePiece tokenizer of Llama 2."""

import functools
import hashlib
import math
import re
import struct
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from config import LlamaConfig
from minllama.common.errors import InputError, missing_file
from minllama.common.files import atomic_write, check_outputs, refuse_lfs_pointer
from minllama.common.program import ArgumentParser, run_script

TOKENIZER_MODEL = "tokenizer.model"
SPACE = "▁"  # SentencePiece's sign for a space
# Characters of many scripts.
SAMPLE = "".join(map(chr, [*range(1, 128), *range(128, 2048, 32), *range(2048, 0xD800, 512)]))


class Tokenizer:
    """Text to token ids and back.

    Args:
        max_len: truncate texts to this many ids, BOS and EOS not counted; None keeps all.
        tokenizer_model: a SentencePiece model; None is `tokenizer.model` in the working directory.

    Attributes:
        n_words: number of pieces.
        bos_id, eos_id: ids that begin and end a text.
        pad_id: id of `<0x00>`, a byte that no text has; of `<unk>` if there is no such piece.

    Raises:
        FileNotFoundError: the file does not exist.
        InputError: it is not a SentencePiece model.
    """

    def __init__(self, max_len: int | None = None, tokenizer_model: str | Path | None = None):
        self.model_path = Path(tokenizer_model or TOKENIZER_MODEL)
        if not self.model_path.is_file():
            raise missing_file(self.model_path)
        self.sp_model = SentencePieceProcessor()
        try:
            self.sp_model.LoadFromSerializedProto(self.model_path.read_bytes())
            self.n_words = self.sp_model.vocab_size()
            ids = list(range(self.n_words))
            self.sp_model.id_to_piece(ids)  # fails if one is not text; the library does not check
            self.sp_model.decode([[i] for i in ids])
            self.sp_model.decode(self.sp_model.encode(SAMPLE))
        except (RuntimeError, ValueError, IndexError) as error:
            refuse_lfs_pointer(self.model_path)
            kind = "not a SentencePiece model, or damaged; fetch it again"
            if re.match(rb"[\w+/]+=* \d+\s", self.model_path.read_bytes()[:1000]):
                kind = "a tiktoken model, as of Llama 3; only SentencePiece, as of Llama 2, is read"
            raise InputError(f"{self.model_path}: {kind}") from error
        self.bos_id = self.sp_model.bos_id()
        self.eos_id = self.sp_model.eos_id()
        self.pad_id = self.sp_model.piece_to_id("<0x00>")
        self.max_len = max_len

    @functools.cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of the pieces and the rules, which identifies the tokenizer."""
        return hashlib.sha256(self.sp_model.serialized_model_proto()).hexdigest()

    def encode(self, s: str, bos: bool, eos: bool, truncate: bool = True) -> list[int]:
        """Tokenize a text.

        Args:
            bos, eos: add BOS in front, EOS at the end.
            truncate: keep `max_len` ids only, before these two are added.

        Raises:
            InputError: the text has surrogates, which are not characters.
        """
        try:
            s.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{s[:40]!r}: not valid Unicode, it cannot be tokenized") from error
        ids = self.sp_model.encode(s)
        if truncate:
            ids = ids[: self.max_len]
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without BOS and EOS."""
        return self.sp_model.decode(ids)

    def export(self) -> None:
        """Write the pieces in llama2.c's format, next to the model with the suffix `.bin`.

        Raises:
            InputError: that file is the model itself, or llama2.c needs another order of pieces.
        """
        if self.llama2c_order() != list(range(self.n_words)):
            raise InputError(
                f"{self.model_path}: llama2.c has the 256 bytes at 3, after <unk>, BOS and EOS; "
                "minllama.checkpoints.convert writes model and tokenizer in that order"
            )
        path = self.model_path.with_suffix(".bin")
        check_outputs([path], [self.model_path])
        with atomic_write(path, "wb") as file:
            file.write(self.to_llama2c())

    def to_llama2c(self) -> bytes:
        """The pieces in llama2.c's format.

        First the length in bytes of the longest piece (int32), then for each piece its score
        (float32), its length in bytes (int32) and its bytes, in the order of `llama2c_order`.
        """
        parts, longest = [], 0
        for i in self.llama2c_order():
            piece = self.sp_model.id_to_piece(i)
            if i in (self.bos_id, self.eos_id):
                piece = f"\n{piece}\n"
            text = piece.replace(SPACE, " ").encode()
            parts.append(struct.pack("<fi", self.sp_model.get_score(i), len(text)) + text)
            longest = max(longest, len(text))
        return struct.pack("<i", longest) + b"".join(parts)

    def check_exportable(self) -> None:
        """Check that other programs, which know BPE as in Llama 2, give texts the same ids.

        Raises:
            InputError: they would not.
        """
        scores = self.text_scores()
        # SentencePiece takes whole what a user defined; its score is 0, that of a merge -0 or less.
        whole = [p for p, x in scores.items() if len(p) > 1 and math.copysign(1, x) > 0]
        text = SAMPLE + "  a "
        if not all(score.is_integer() for score in scores.values()):  # else they are probabilities
            fault = "is not a BPE model"
        elif self.sp_model.normalize(text) != SPACE + text.replace(" ", SPACE):
            fault = "changes texts before it tokenizes them, such as runs of spaces"
        elif whole:
            fault = f"has symbols that a user defined, such as {whole[0]!r}"
        else:
            return
        raise InputError(f"{self.model_path}: {fault}, unlike Llama's; it cannot be exported")

    def text_scores(self) -> dict[str, float]:
        """The pieces that stand for text, with their scores: the higher, the earlier a merge."""
        sp = self.sp_model
        return {
            sp.id_to_piece(i): sp.get_score(i)
            for i in range(self.n_words)
            if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i) or sp.is_unused(i))
        }

    def llama2c_order(self) -> list[int]:
        """The ids in the order of llama2.c: `<unk>`, BOS, EOS, the 256 bytes, all other pieces.

        Its programs take the id of a byte for the byte + 3, begin with 1 and stop at 1.

        Raises:
            InputError: there are no pieces for bytes, or ids would differ in another way.
        """
        self.check_exportable()
        first = [self.sp_model.unk_id(), self.bos_id, self.eos_id]
        first += [self.sp_model.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        if min(first) < 0 or len(set(first)) < len(first):
            raise InputError(
                f"{self.model_path}: no pieces for BOS, EOS and the 256 bytes, without which "
                "llama2.c's programs fail; train with a larger --vocab_size"
            )
        is_first = set(first)
        return first + [i for i in range(self.n_words) if i not in is_first]


def check_fingerprint(tokenizer: Tokenizer, expected: str | None, weights: str | Path) -> None:
    """Check that a tokenizer is the one that weights were trained with; None if that is unknown.

    Raises:
        InputError: it is another one.
    """
    if expected not in (None, tokenizer.fingerprint):
        raise InputError(
            f"{tokenizer.model_path}: not the tokenizer that {weights} was trained with; name that "
            "one with --tokenizer-path"
        )


def check_vocabulary(tokenizer: Tokenizer, config: LlamaConfig, checkpoint: str | Path) -> None:
    """Check that a tokenizer fits a model.

    Raises:
        InputError: it is another model's, or lacks BOS or EOS.
    """
    for name, token_id in (("BOS", tokenizer.bos_id), ("EOS", tokenizer.eos_id)):
        if token_id < 0:
            raise InputError(f"{tokenizer.model_path}: a tokenizer without {name} is no Llama's")
    if tokenizer.n_words < config.vocab_size <= tokenizer.n_words + 1000:
        raise InputError(
            f"{checkpoint}: {config.vocab_size - tokenizer.n_words} rows more than "
            f"{tokenizer.model_path} has pieces; if tokens were added to its model, remove their "
            f"rows, for instance with Transformers' resize_token_embeddings({tokenizer.n_words}); "
            "else name that model's own with --tokenizer-path"
        )
    if tokenizer.n_words != config.vocab_size:
        raise InputError(
            f"{tokenizer.model_path}: its {tokenizer.n_words} pieces do not match the vocabulary "
            f"of {config.vocab_size} in {checkpoint}; name that model's own with --tokenizer-path"
        )
    check_fingerprint(tokenizer, config.tokenizer, checkpoint)


def main() -> None:
    parser = ArgumentParser(description="Write the tokenizer for llama2.c, beside the model.")
    parser.add_argument("-t", "--tokenizer-model", help="by default tokenizer.model")
    Tokenizer(tokenizer_model=parser.parse_args().tokenizer_model).export()


if __name__ == "__main__":
    run_script(main)
