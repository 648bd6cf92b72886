"""The demo model's text: what is held out, what is left out, and where training ends."""

import hashlib
import lzma
import math
import re
import sys

import pytest
import torch
from conftest import make_llama

from experiments import corpus
from experiments.bits_per_byte import bits_per_byte
from minllama.common.errors import InputError
from minllama.common.program import run_script
from minllama.text.documents import Corpus


def test_the_list_of_the_project_names_no_word_openly():
    words = corpus.OFFENSIVE.read_text().split()
    assert all(re.fullmatch(r"[0-9a-f]{16}", word) for word in words)
    assert len(words) == len(set(words)) > 500
    assert corpus.has_offensive_word("damn")  # the mildest of them
    assert not corpus.has_offensive_word("story hell queer scunthorpe classic as")


def test_a_cut_loses_nothing_and_ends_at_lines():
    document = "\n".join(f"line {i} of a story" for i in range(100))
    pieces = corpus.cut(document, 300)
    assert "\n".join(pieces) == document
    assert all(300 <= len(piece) + 1 < 330 for piece in pieces[:-1])
    assert corpus.cut("one line only", 300) == ["one line only"]


def test_an_offensive_word_costs_its_section_only(monkeypatch):
    digest = hashlib.sha256(b"blast").hexdigest()[:16]
    monkeypatch.setattr(corpus, "offensive_digests", lambda: frozenset([digest]))
    long = "\n".join(["A quiet line."] * 600 + ["Oh blast."] + ["Another line."] * 600)
    source = corpus.divide([long])
    (left_out,) = source.offensive
    assert "blast" in left_out
    kept = source.train + source.validation + source.held_out
    assert sum(map(len, kept)) > len(long) - len(left_out) - 100


def test_what_is_held_out_depends_on_the_document_alone():
    documents = [f"Story {i}." for i in range(3000)]
    all_of_them = corpus.divide(documents)
    some = corpus.divide(documents[::-2])
    assert set(some.held_out) == set(all_of_them.held_out) & set(documents[::-2])
    assert len(all_of_them.held_out) == pytest.approx(3000 * corpus.HELD_OUT, rel=0.3)
    assert len(all_of_them.validation) == pytest.approx(3000 * corpus.VALIDATION, rel=0.5)
    assert len(all_of_them.train + all_of_them.validation + all_of_them.held_out) == 3000


def test_copies_of_what_is_held_out_are_not_trained_on():
    words = [f"w{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(200)]
    passage, stock_phrase = " ".join(words[:60]), " ".join(words[:20])
    held_out = corpus.Source(1, held_out=[passage])
    other = corpus.Source(
        2, train=[f"Before. {passage.upper()}!", f"{stock_phrase} in a new story"]
    )
    corpus.take_out_copies([held_out, other])
    assert other.copies == [f"Before. {passage.upper()}!"]
    assert other.train == [f"{stock_phrase} in a new story"]


def test_a_fraction_is_a_share_of_the_sections():
    sections = [f"Story {i}." for i in range(2000)]
    half = corpus.repeated(sections, 0.5)
    assert len(half) == len(set(half)) == pytest.approx(1000, rel=0.1)
    assert len(corpus.repeated(sections, 2.5)) == 4000 + len(half)
    assert corpus.repeated(sections, 0) == []


def test_the_easiest_sections_have_the_fewest_rare_words(monkeypatch):
    monkeypatch.setattr(corpus, "N_FREQUENT", 2)
    sections = ["* * * 1852", "a cat sat", "a cat a cat", "zebras yodel", "a cat, a cat sat"]
    source = corpus.Source(5, train=list(sections), validation=["a zebra", "a cat"])
    corpus.easiest_first([source])
    assert source.train == [sections[i] for i in (2, 4, 1, 0, 3)]
    assert source.validation == ["a cat", "a zebra"]
    assert corpus.repeated(source.train, 0.5, first=True) == source.train[:3]
    assert corpus.repeated(source.train, 1.2, first=True) == [source.train[0], *source.train]


@pytest.fixture
def corpora(tmp_path):
    """A folder with every source, each of 60 short documents of its own."""
    for number, name in enumerate(corpus.REPEAT):
        documents = [f"{name} has a tale, number {number * 60 + i}.\nIt ends." for i in range(60)]
        text = "\n<|endoftext|>\n".join(documents)
        (tmp_path / f"{name}.txt.xz").write_bytes(lzma.compress(text.encode()))
    return tmp_path


def make(monkeypatch, *flags) -> None:
    monkeypatch.setattr(sys, "argv", ["corpus", *map(str, flags)])
    run_script(corpus.main)


def test_training_ends_where_validation_begins(corpora, monkeypatch, capsys):
    times = corpus.REPEAT | {"tinystories": 2.5, "books_general": 0}
    make(monkeypatch, corpora, corpora, "--repeat", "tinystories=2.5", "books_general=0")
    shares = re.search("--split (.*)", capsys.readouterr().out)[1].split()
    texts = {"train": [], "validation": []}
    for split, chunk in Corpus([corpora / "train.txt"], list(map(float, shares))).split_chunks():
        texts[split].append(chunk.text)
    expected = {"train": [], "validation": []}
    for name in corpus.REPEAT:
        documents = corpus.read_documents(corpora / f"{name}.txt.xz")
        source = corpus.divide(documents)
        expected["train"] += corpus.repeated(source.train, times[name])
        expected["validation"] += source.validation
        held_out = (corpora / f"held-out-{name}.txt").read_text()
        assert held_out == "".join(f"{text}\n<|endoftext|>\n" for text in source.held_out)
    for split, expected_texts in expected.items():
        assert sorted(texts[split]) == sorted(expected_texts)
    assert len(corpus.read_documents(corpora / "sources.txt")) == 60 * len(corpus.REPEAT)


def test_the_easiest_share_is_taken_of_train_and_validation(corpora, monkeypatch):
    monkeypatch.setattr(corpus, "VALIDATION", 0.2)
    documents = corpus.read_documents(corpora / "fairytaleqa.txt.xz")
    source = corpus.divide(documents)
    for share in (0, 0.3, 2):
        make(monkeypatch, corpora, corpora, "--easiest", "--repeat", f"fairytaleqa={share}")
        texts = corpus.read_documents(corpora / "train.txt")
        n_taken = sum(text.startswith("fairytaleqa") for text in texts)
        expected = math.ceil(share * len(source.train))
        expected += math.ceil(min(share, 1) * len(source.validation))
        assert n_taken == expected


@pytest.mark.parametrize("repeat", ["imdb=1", "tinystories", "tinystories=-1", "tinystories=inf"])
def test_a_mixture_that_cannot_be_is_refused(corpora, monkeypatch, capsys, repeat):
    with pytest.raises(SystemExit, match="2"):
        make(monkeypatch, corpora, corpora, "--repeat", repeat)
    assert capsys.readouterr().err.startswith(f"error: --repeat {repeat}: ")
    assert not (corpora / "train.txt").exists()


def test_texts_that_a_model_cannot_score_are_refused(tokenizer):
    llama = make_llama(causal=True)
    with pytest.raises(InputError, match="does not fit the context of"):
        bits_per_byte(llama, tokenizer, ["A cat. " * llama.config.max_seq_len])
    llama.norm.weight.data.fill_(torch.inf)
    with pytest.raises(InputError, match="the log-likelihood is nan"):
        bits_per_byte(llama, tokenizer, ["A cat."])


def test_a_source_that_is_damaged_is_named(corpora):
    (corpora / "fairytaleqa.txt.xz").write_bytes(b"no such thing")
    with pytest.raises(InputError, match=r"fairytaleqa\.txt\.xz: not an xz-compressed"):
        corpus.read_documents(corpora / "fairytaleqa.txt.xz")
