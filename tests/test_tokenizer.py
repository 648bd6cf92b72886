"""Ids, padding and export; on real tokenizers if they are there."""

import struct

import pytest

from config import LlamaConfig
from minllama.common.errors import InputError
from tokenizer import Tokenizer, check_vocabulary


def test_cuts_before_bos_and_eos_are_added(tokenizer, tokenizer_path):
    whole = tokenizer.encode("a warm and funny film", bos=False, eos=False)
    short = Tokenizer(3, tokenizer_path)
    assert len(whole) > 3
    assert short.encode("a warm and funny film", bos=True, eos=True) == [1, *whole[:3], 2]
    assert tokenizer.encode("", bos=True, eos=False) == [1]


def test_decodes_what_it_encodes_unknown_characters_included(tokenizer):
    for text in ("a warm and funny film", "naïve 映画 🎬", "two  spaces"):
        ids = tokenizer.encode(text, bos=True, eos=True)
        assert tokenizer.decode(ids) == text
        assert tokenizer.pad_id not in ids


def test_llama_tokenizer_is_as_the_assignment_says(assets):
    llama = Tokenizer(tokenizer_model=assets / "tokenizer.model")
    assert (llama.n_words, llama.bos_id, llama.eos_id, llama.pad_id) == (32000, 1, 2, 3)
    assert llama.encode("hello world", bos=True, eos=False) == [1, 22172, 3186]


def test_export_is_llama2c_format_byte_for_byte(real_assets, tmp_path):
    folder = real_assets("stories260K")
    (tmp_path / "tok512.model").write_bytes((folder / "tok512.model").read_bytes())
    Tokenizer(tokenizer_model=tmp_path / "tok512.model").export()
    assert (tmp_path / "tok512.bin").read_bytes() == (folder / "tok512.bin").read_bytes()


def test_export_reads_back_and_never_overwrites_its_model(tokenizer_path, tmp_path):
    (tmp_path / "t.model").write_bytes(tokenizer_path.read_bytes())
    Tokenizer(tokenizer_model=tmp_path / "t.model").export()
    content = (tmp_path / "t.bin").read_bytes()
    (longest,), offset, pieces = struct.unpack_from("<I", content), 4, []
    while offset < len(content):
        _, length = struct.unpack_from("<fI", content, offset)
        pieces.append(content[offset + 8 : offset + 8 + length])
        offset += 8 + length
    assert len(pieces) == 320 and max(map(len, pieces)) == longest
    assert pieces[1:4] == [b"\n<s>\n", b"\n</s>\n", b"<0x00>"]
    (tmp_path / "t.model").rename(tmp_path / "t.bin")
    with pytest.raises(InputError, match=r"t\.bin: would overwrite the input"):
        Tokenizer(tokenizer_model=tmp_path / "t.bin").export()
    assert (tmp_path / "t.bin").read_bytes() == tokenizer_path.read_bytes()


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"setup\.sh"):
        Tokenizer(tokenizer_model=tmp_path / "absent.model")
    for content, kind in (
        (b"", "not a SentencePiece model"),
        (b"<html>", "not a SentencePiece model"),
        (b"\x00" * 1000, "not a SentencePiece model"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"IQ== 0\nIg== 1\nIw== 2\n", "a tiktoken model, as of Llama 3"),
    ):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(InputError, match=kind):
            Tokenizer(tokenizer_model=tmp_path / "bad.model")


def test_added_tokens_are_named(tokenizer):
    with pytest.raises(
        InputError, match=r"x.pt: 1 rows more than .* resize_token_embeddings\(320\)"
    ):
        check_vocabulary(tokenizer, LlamaConfig(vocab_size=321), "x.pt")
    with pytest.raises(InputError, match="--tokenizer-path"):
        check_vocabulary(tokenizer, LlamaConfig(vocab_size=319), "x.pt")


def test_a_tokenizer_with_one_changed_byte_loads_or_is_refused(tokenizer_path, tmp_path):
    """SentencePiece itself takes pieces that are no text, and fails when they come up."""
    content = tokenizer_path.read_bytes()
    path = tmp_path / "changed.model"
    for position in range(0, len(content), 7):
        changed = bytearray(content)
        changed[position] ^= 0x80
        path.write_bytes(changed)
        try:
            tokenizer = Tokenizer(tokenizer_model=path)
            check_vocabulary(tokenizer, LlamaConfig(vocab_size=320), "model.pt")
            assert tokenizer.to_llama2c()
        except InputError:
            continue
        ids = tokenizer.encode("a warm and funny film, naïve 映画", bos=True, eos=True)
        assert isinstance(tokenizer.decode(ids), str)
