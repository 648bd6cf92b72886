"""Ids on disk: written once, checked, and made again if they are damaged."""

import json

import numpy as np
import pytest
import sentencepiece
from conftest import SENTENCES
from text_kit import SHARES, words, write_documents

from minllama.common.errors import InputError
from minllama.text.corpus import tokenize
from minllama.text.documents import Corpus
from minllama.text.tokenizer_training import train_tokenizer
from tokenizer import Tokenizer


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
    assert list(texts) == ["train", "validation", "test"]
    ids, starts = [], []
    for name, text in texts.items():
        assert all(isinstance(file, np.memmap) for file in text.files)
        files = (folder / f"{name}.bin").read_bytes(), (folder / f"{name}.starts.bin").read_bytes()
        assert files[0] == b"".join(i.to_bytes(2, "little") for i in text[:].tolist())
        assert files[1] == b"".join(i.to_bytes(8, "little") for i in text.starts.tolist())
        starts += [len(ids) + start for start in text.starts.tolist()]
        ids += text[:].tolist()
    assert ids == [i for tokens in encoded for i in tokens]
    assert starts == [sum(map(len, encoded[:i])) for i in range(40)]
    n = len(texts["train"].starts)
    n_bytes, n_tokens = sum(len(d.encode()) for d in documents[:n]), sum(map(len, encoded[:n]))
    assert texts["train"].tokens_per_byte == (n_tokens - n) / n_bytes
    counts = {"n_bytes": n_bytes, "n_tokens": n_tokens, "n_unknown": 0, "n_documents": n}
    assert json.loads((folder / "index.json").read_bytes())["train"] == counts


def test_intact_files_are_not_made_again(paths, tokenizer, folder):
    before = tokenize(Corpus(paths, (1, 0, 0)), tokenizer, folder)["train"][:].tolist()
    paths[0].unlink()
    assert tokenize(Corpus(paths, (1, 0, 0)), tokenizer, folder)["train"][:].tolist() == before


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


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("the fox\nsaw the hen", r"'e fox\\nsaw the hen' comes back as 'e fox saw the hen'"),
        ("the fox  saw the hen", r"' fox  saw the hen' comes back as ' fox saw the hen'"),
    ],
)
def test_a_tokenizer_that_loses_text_is_named_before_training(tmp_path, folder, text, lost):
    """SentencePiece's defaults join lines and spaces."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_prefix=str(tmp_path / "lossy"),
        model_type="bpe",
        vocab_size=60,
        minloglevel=2,
    )
    tokenizer = Tokenizer(tokenizer_model=tmp_path / "lossy.model")
    paths = write_documents(tmp_path / "a.txt", ["the fox saw the hen", text])
    with pytest.warns(UserWarning, match=lost):
        tokenize(Corpus(paths, (1, 0, 0)), tokenizer, folder)
