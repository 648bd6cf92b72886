"""Ids on disk: written once, checked, and made again if they are damaged."""

import json

import numpy as np
import pytest
from text_kit import SHARES, words, write_documents

from minllama.common.errors import InputError
from minllama.text.documents import Corpus
from minllama.text.tokenized import tokenize
from minllama.text.tokenizer_training import train_tokenizer
from tokenizer import Tokenizer

SPLITS = ("train", "validation", "test")


@pytest.fixture
def documents():
    return [words(n, seed=n) for n in range(1, 41)]


@pytest.fixture
def paths(tmp_path, documents):
    return write_documents(tmp_path / "a.txt", documents)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "tokens"


def test_ids_and_starts_are_those_of_the_documents(paths, documents, tokenizer, folder):
    texts = tokenize(Corpus(paths, SHARES), tokenizer, folder)
    encoded = [tokenizer.encode(document, bos=True, eos=False) for document in documents]
    assert list(texts) == list(SPLITS)
    ids, starts = [], []
    for text in texts.values():
        assert isinstance(text.ids, np.memmap)
        starts += [len(ids) + start for start in text.starts.tolist()]
        ids += text.ids.tolist()
    assert ids == [i for tokens in encoded for i in tokens]
    assert starts == [sum(map(len, encoded[:i])) for i in range(40)]
    sizes = [len(document.encode()) for document in documents]
    assert sum(text.n_bytes for text in texts.values()) == sum(sizes)
    n_train = len(texts["train"].starts)
    n_tokens = sum(map(len, encoded[:n_train])) - n_train
    assert texts["train"].tokens_per_byte == n_tokens / sum(sizes[:n_train])


def test_the_files_are_little_endian_integers(paths, documents, tokenizer, folder):
    tokenize(Corpus(paths, (1, 0, 0)), tokenizer, folder)
    encoded = [tokenizer.encode(document, bos=True, eos=False) for document in documents]
    ids = b"".join(i.to_bytes(2, "little") for tokens in encoded for i in tokens)
    starts = (sum(map(len, encoded[:i])).to_bytes(8, "little") for i in range(40))
    assert (folder / "train.bin").read_bytes() == ids
    assert (folder / "train.starts.bin").read_bytes() == b"".join(starts)
    index = json.loads((folder / "index.json").read_bytes())
    assert index["train"] == {
        "n_bytes": sum(len(document.encode()) for document in documents),
        "n_tokens": len(ids) // 2,
        "n_unknown": 0,
        "n_documents": 40,
    }


def test_intact_files_are_not_made_again(paths, tokenizer, folder):
    before = tokenize(Corpus(paths, (1, 0, 0)), tokenizer, folder)["train"].ids.tolist()
    paths[0].unlink()
    assert tokenize(Corpus(paths, (1, 0, 0)), tokenizer, folder)["train"].ids.tolist() == before


@pytest.mark.parametrize("name", ["train.bin", "train.starts.bin"])
@pytest.mark.parametrize("damage", ["cut", "changed", "absent"])
def test_damaged_files_are_made_again(paths, tokenizer, folder, name, damage):
    tokenize(Corpus(paths, (1, 0, 0)), tokenizer, folder)
    saved = (folder / name).read_bytes()
    if damage == "absent":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(saved[:-2] + (b"" if damage == "cut" else b"\1\1"))
    tokenize(Corpus(paths, (1, 0, 0)), tokenizer, folder)
    assert (folder / name).read_bytes() == saved


@pytest.mark.parametrize(
    "text", ["", "[" * 100_000, "[]", '{"files": 1}', '{"train": {"n_tokens": -1}}', "{}", None]
)
def test_a_damaged_index_is_made_again(paths, tokenizer, folder, text):
    tokenize(Corpus(paths, (1, 0, 0)), tokenizer, folder)
    saved = (folder / "index.json").read_text()
    damaged = saved.replace("n_bytes", "bytes") if text is None else text
    (folder / "index.json").write_text(damaged)
    tokenize(Corpus(paths, (1, 0, 0)), tokenizer, folder)
    assert (folder / "index.json").read_text() == saved


def test_tokens_of_another_tokenizer_are_refused(paths, tmp_path, tokenizer, folder):
    tokenize(Corpus(paths, (1, 0, 0)), tokenizer, folder)
    train_tokenizer(lambda: [words(2000, seed=1)], 280, tmp_path / "other.model")
    other = Tokenizer(tokenizer_model=tmp_path / "other.model")
    with pytest.raises(InputError, match=r"other\.model: not the tokenizer that made .*tokens;"):
        tokenize(Corpus(paths, (1, 0, 0)), other, folder)


def test_unknown_characters_are_counted(tmp_path, folder):
    with pytest.warns(UserWarning):
        train_tokenizer(lambda: [words(2000)], 20, tmp_path / "tokenizer.model")
    tokenizer = Tokenizer(tokenizer_model=tmp_path / "tokenizer.model")
    paths = write_documents(tmp_path / "a.txt", ["a 猫 bc ö ghij"])
    assert tokenize(Corpus(paths, (1, 0, 0)), tokenizer, folder)["train"].n_unknown == 2


def test_large_vocabularies_take_four_bytes(tmp_path, tokenizer, folder, monkeypatch):
    monkeypatch.setattr(tokenizer, "n_words", 70_000)
    paths = write_documents(tmp_path / "a.txt", [words(50)])
    ids = tokenize(Corpus(paths, (1, 0, 0)), tokenizer, folder)["train"].ids
    assert ids.dtype.itemsize == 4
    assert ids.tolist() == tokenizer.encode(words(50), bos=True, eos=False)
