"""Reading documents in chunks, and splitting them."""

import pytest
from text_kit import SHARES, words, write_documents

from minllama.common.errors import InputError
from minllama.text.corpus import encode_chunk, tokenize
from minllama.text.documents import Corpus, read_chunks


@pytest.mark.parametrize(
    ("content", "documents"),
    [
        ("One.\nTwo.\n<|endoftext|>\n\n  Three  \n <|endoftext|> \n", ["One.\nTwo.", "Three"]),
        ("\n first line\n\nsecond line \n", ["first line\n\nsecond line"]),
        ("1 ||| good film\n0 ||| bad film\n", ["good film", "bad film"]),
        ("\ufeffA “très” 猫", ["A “très” 猫"]),
        (" \n<|endoftext|>\n\n", []),
    ],
)
def test_documents(tmp_path, content, documents):
    (tmp_path / "a.txt").write_text(content, encoding="utf-8")
    assert list(read_chunks(tmp_path / "a.txt")) == [(document, True) for document in documents]


@pytest.mark.parametrize(
    "text",
    [
        words(500),
        "\n".join(words(20, seed) for seed in range(30)),
        "\n".join("猫犬鳥" * 4 for _ in range(300)),
        "ab c" * 200 + "x" * 3000 + " yz" * 100,
    ],
    ids=["words", "lines", "no spaces", "a long word"],
)
def test_chunks_of_a_document_have_its_text_and_its_ids(tmp_path, tokenizer, text):
    (tmp_path / "a.txt").write_text(text)
    chunks = list(read_chunks(tmp_path / "a.txt", size=50))
    assert len(chunks) > 10
    assert [begins for _, begins in chunks] == [True] + [False] * (len(chunks) - 1)
    assert "".join(chunk for chunk, _ in chunks) == text
    ids = [i for chunk in chunks for i in encode_chunk(tokenizer, chunk)]
    assert ids == tokenizer.encode(text, bos=True, eos=False)


@pytest.mark.parametrize("text", ["\n".join(["猫犬鳥魚"] * 1_000_000), "x" * 5_000_000])
def test_chunks_are_bounded_without_spaces_too(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    assert max(len(chunk) for chunk, _ in read_chunks(tmp_path / "a.txt")) <= 3 * (1 << 20)


def test_texts_that_cannot_be_used_are_refused(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_bytes(b"abc\xff\xfe")
    with pytest.raises(InputError, match=r"a\.txt: not UTF-8"):
        list(read_chunks(tmp_path / "a.txt"))
    paths = write_documents(tmp_path / "empty.txt", [" ", "\n"])
    with pytest.raises(InputError, match=r"empty\.txt: no text"):
        list(Corpus(paths, SHARES).split_chunks())
    paths = write_documents(tmp_path / "short.txt", ["one", "two", "three"])
    with pytest.raises(InputError, match=r"short\.txt: no text for validation"):
        tokenize(Corpus(paths, (0.98, 0.01, 0.01)), tokenizer, tmp_path / "tokens")
    assert list((tmp_path / "tokens").iterdir()) == []


@pytest.mark.parametrize("documents", [[words(20, seed) for seed in range(100)], [words(5000)]])
def test_splits_are_of_whole_documents_or_cut_a_single_one(tmp_path, documents):
    paths = write_documents(tmp_path / "a.txt", documents)
    splits = {"train": [], "validation": [], "test": []}
    n_begun = 0
    for split, (text, begins) in Corpus(paths, SHARES).split_chunks():
        splits[split].append(text)
        n_begun += begins
    chunks = [text for chunks in splits.values() for text in chunks]
    if len(documents) > 1:
        assert chunks == documents
    assert "".join(chunks) == "".join(documents)
    assert n_begun == (len(documents) if len(documents) > 1 else 3)
    sizes = [len("".join(chunks).encode()) for chunks in splits.values()]
    for size, share in zip(sizes, SHARES, strict=True):
        assert size / sum(sizes) == pytest.approx(share, abs=0.02)
