"""The text of reviews on which pre-training is continued."""

import importlib.util
import io
import tarfile

import pytest

from experiments import reviews
from experiments.reviews import as_treebank, is_tokenized, make_text, read_reviews
from minllama.common.errors import InputError

needs_nltk = pytest.mark.skipif(importlib.util.find_spec("nltk") is None, reason="needs NLTK")

REVIEW = "I can't say (yet) that it's good. \"Big\" is and/or isn't. It cost $5, maybe?"


@needs_nltk
def test_tokens_are_those_of_the_two_data_sets():
    assert as_treebank(REVIEW, brackets=True) == (
        "I ca n't say -LRB- yet -RRB- that it 's good . `` Big '' is and\\/or is n't . "
        "It cost $ 5 , maybe ?"
    )
    assert as_treebank(REVIEW, brackets=False) == (
        "I ca n't say ( yet ) that it 's good . \" Big \" is and/or is n't . It cost $ 5 , maybe ?"
    )


def test_what_is_tokenized_stays():
    tokenized = "the film , which is n't bad , ends . i liked it ."
    assert is_tokenized(tokenized) and not is_tokenized(REVIEW)
    assert make_text([tokenized] * 20, None) == [tokenized] * 20


@needs_nltk
def test_half_are_tokenized_and_a_smaller_text_begins_a_larger_one():
    documents = [f"{REVIEW} This is number {i}." for i in range(400)]
    whole = make_text(documents, None)
    kinds = ["-LRB-" in text for text in whole], ["( yet )" in text for text in whole]
    assert all(70 < sum(kind) < 130 for kind in kinds)
    small = make_text(documents, 0.01)
    assert small == whole[: len(small)] and 10_000 <= sum(map(len, small)) < 10_200


def archive_of(path, files: dict[str, str], encoding: str = "utf-8"):
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode(encoding))
            archive.addfile(member, io.BytesIO(text.encode(encoding)))
    return path


def test_an_archive_has_its_reviews_without_html(tmp_path):
    files = {
        "aclImdb/README": "Large Movie Review Dataset",
        "aclImdb/train/urls_pos.txt": "http://example.org",
        "aclImdb/train/pos/0_9.txt": "Good.<br /><br />Caf\u00e9 &amp; bar.",
        "aclImdb/train/unsup/0_0.txt": "Good.<BR>Caf\u00e9 &amp; bar.",
        "txt_sentoken/neg/cv000.txt": "bad , \n really .\n",
    }
    for encoding in ("latin-1", "utf-8"):
        path = archive_of(tmp_path / "reviews.tar.gz", files, encoding)
        assert read_reviews(path) == [*["Good.\nCaf\u00e9 & bar."] * 2, "bad , \n really ."]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"reviews.tar.gz: not a whole \.tar\.gz file"):
        read_reviews(path)
    with pytest.raises(InputError, match=r"no \.txt file with a text in a folder pos"):
        read_reviews(archive_of(tmp_path / "other.tgz", {"a.txt": "a"}))


@pytest.mark.parametrize("kept", ["sst-dev", "sst-test", "cfimdb-dev", "cfimdb-test"])
def test_what_is_evaluated_is_not_read(tmp_path, monkeypatch, kept):
    sentence = "It does n't -LRB- really -RRB- say why they 're here ; nobody asked . So what"
    for name in ("sst", "cfimdb"):
        monkeypatch.setattr(reviews, name.upper(), str(tmp_path / name))
        for split in ("dev", "test"):
            text = sentence if kept == f"{name}-{split}" else "nothing"
            (tmp_path / f"{name}-{split}.txt").write_text(f"0 ||| {text}\n")
    copy = (
        "Does it? It doesn't (really) say why they're here; nobody asked. So, a film."  # ten words
    )
    nearly = "It doesn't (really) say why they're here; nobody knows. So what?"
    assert reviews.without_evaluated([copy, nearly]) == [nearly]
