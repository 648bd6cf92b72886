"""Tokenizers trained on a text."""

import pytest
from text_kit import words

from minllama.common.errors import InputError
from minllama.text.tokenizer_training import train_tokenizer
from tokenizer import Tokenizer


def test_with_room_for_bytes_every_character_is_kept(tmp_path):
    train_tokenizer(lambda: [words(2000)], 290, tmp_path / "tokenizer.model")
    tokenizer = Tokenizer(tokenizer_model=tmp_path / "tokenizer.model")
    assert tokenizer.n_words == 290
    assert tokenizer.sp_model.id_to_piece(tokenizer.pad_id) == "<0x00>"
    unseen = "abc\nöß 猫  def"
    assert tokenizer.decode(tokenizer.encode(unseen, bos=True, eos=False)) == unseen


def test_without_room_for_bytes_unknown_characters_are_unk(tmp_path):
    with pytest.warns(UserWarning, match="become <unk>"):
        train_tokenizer(lambda: [words(2000)], 20, tmp_path / "tokenizer.model")
    tokenizer = Tokenizer(tokenizer_model=tmp_path / "tokenizer.model")
    assert tokenizer.n_words == 20
    assert tokenizer.pad_id == tokenizer.sp_model.unk_id() == 0
    assert 0 in tokenizer.encode("ö", bos=False, eos=False)
    assert tokenizer.decode(tokenizer.encode("dé\nghij", bos=True, eos=False)) == "dé\nghij"


def test_errors_leave_no_file(tmp_path):
    path = tmp_path / "tokenizer.model"
    with pytest.raises(InputError, match=r"--vocab_size 5000: the text allows at most \d+"):
        train_tokenizer(lambda: [words(2000)], 5000, path)
    with pytest.raises(InputError, match=r"--vocab_size 5: the text needs at least 17"):
        train_tokenizer(lambda: [words(2000)], 5, path)

    def broken():
        yield "a b c"
        raise InputError("the file is broken")

    with pytest.raises(InputError, match="the file is broken"):
        train_tokenizer(broken, 290, path)
    assert not path.exists()


def test_lines_with_sentencepieces_reserved_character_are_learned_from(tmp_path):
    """Its trainer drops every line with U+2585."""
    text = words(2000).replace("\n", "\u2585\n") + "\u2585"
    train_tokenizer(lambda: [text], 290, tmp_path / "tokenizer.model")
    tokenizer = Tokenizer(tokenizer_model=tmp_path / "tokenizer.model")
    ids = tokenizer.encode(text, bos=False, eos=False)
    assert tokenizer.decode(ids) == text and len(ids) < len(text)
