"""Documents, splits, tokenizers and rows of ids for pre-training."""

import random

import numpy as np
import pytest

from corpus import (
    IGNORED,
    EvaluationRows,
    TrainingRows,
    encode_chunk,
    read_chunks,
    split_chunks,
    tokenize,
    train_tokenizer,
)
from tokenizer import Tokenizer
from utils import InputError

STORIES = [
    "One day a fox met a hen .\nThe hen ran home .",
    "A boy had a red ball .",
    "The sun was warm and the sea was blue , and nobody wanted to go home .",
]


@pytest.fixture
def stories(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text("\n<|endoftext|>\n".join(STORIES) + "\n<|endoftext|>\n")
    return path


def words(n: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(("a", "bc", "def", "ghij", "\nk", "l  m")) for _ in range(n))


def test_documents_stand_between_separators(stories):
    assert list(read_chunks(stories)) == [(story, True) for story in STORIES]


def test_a_file_without_separators_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("\n first line\n\nsecond line \n")
    assert list(read_chunks(tmp_path / "a.txt")) == [("first line\n\nsecond line", True)]


def test_the_sentences_of_a_labelled_file_are_documents(tmp_path):
    (tmp_path / "a.txt").write_text("1 ||| good film\n0 ||| bad film\n")
    assert list(read_chunks(tmp_path / "a.txt")) == [("good film", True), ("bad film", True)]


def test_chunks_of_a_document_have_its_ids(tmp_path, tokenizer):
    text = words(500).strip()
    (tmp_path / "a.txt").write_text(text)
    chunks = list(read_chunks(tmp_path / "a.txt", size=50))
    assert len(chunks) > 20
    assert [begins for _, begins in chunks] == [True] + [False] * (len(chunks) - 1)
    assert "".join(chunk for chunk, _ in chunks) == text
    ids = [i for chunk, begins in chunks for i in encode_chunk(tokenizer, chunk, begins)]
    assert ids == tokenizer.encode(text, bos=True, eos=False)


def test_text_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc\xff\xfe")
    with pytest.raises(InputError, match=r"a\.txt: not UTF-8"):
        list(read_chunks(tmp_path / "a.txt"))


def test_documents_stay_whole_when_there_are_several(tmp_path):
    documents = [words(20, seed).strip() for seed in range(100)]
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(documents))
    parts = [[], [], []]
    for part, text, begins in split_chunks([tmp_path / "a.txt"], (0.7, 0.15, 0.15)):
        assert begins
        parts[part].append(text)
    assert parts[0] + parts[1] + parts[2] == documents
    total = sum(len(document) for document in documents)
    for part, share in zip(parts, (0.7, 0.15, 0.15), strict=True):
        assert sum(len(text) for text in part) / total == pytest.approx(share, abs=0.02)


def test_a_single_document_is_cut_by_its_length(tmp_path):
    text = words(5000).strip()
    (tmp_path / "a.txt").write_text(text)
    parts, begun = ["", "", ""], [0, 0, 0]
    for part, chunk, begins in split_chunks([tmp_path / "a.txt"], (0.7, 0.15, 0.15)):
        parts[part] += chunk
        begun[part] += begins
    assert "".join(parts) == text
    assert begun == [1, 1, 1]
    for part, share in zip(parts, (0.7, 0.15, 0.15), strict=True):
        assert len(part) / len(text) == pytest.approx(share, abs=0.003)


def test_a_part_that_would_be_empty_is_an_error(stories, tmp_path):
    with pytest.raises(InputError, match="nothing for validation"):
        list(split_chunks([stories], (0.98, 0.01, 0.01)))
    assert {part for part, *_ in split_chunks([stories], (1, 0, 0))} == {0}
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(InputError, match="no text"):
        list(split_chunks([tmp_path / "empty.txt"], (0.7, 0.15, 0.15)))


def test_a_tokenizer_with_room_for_bytes_keeps_every_character(tmp_path):
    text = words(2000)
    train_tokenizer(lambda: [text], 290, tmp_path / "tokenizer.model")
    tokenizer = Tokenizer(tokenizer_model=tmp_path / "tokenizer.model")
    assert tokenizer.n_words == 290
    assert tokenizer.sp_model.id_to_piece(tokenizer.pad_id) == "<0x00>"
    unseen = "abc\nöß 猫  def"
    assert tokenizer.decode(tokenizer.encode(unseen, bos=True, eos=False)) == unseen


def test_a_small_vocabulary_says_what_becomes_of_unknown_characters(tmp_path):
    text = words(2000)
    with pytest.warns(UserWarning, match="become <unk>"):
        train_tokenizer(lambda: [text], 20, tmp_path / "tokenizer.model")
    tokenizer = Tokenizer(tokenizer_model=tmp_path / "tokenizer.model")
    assert tokenizer.n_words == 20
    assert tokenizer.pad_id == tokenizer.sp_model.unk_id() == 0
    assert 0 in tokenizer.encode("ö", bos=False, eos=False)
    assert tokenizer.decode(tokenizer.encode("def\nghij", bos=True, eos=False)) == "def\nghij"


def test_a_vocabulary_that_the_text_cannot_support_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"--vocab_size 5000: the text allows at most \d+"):
        train_tokenizer(lambda: [words(2000)], 5000, tmp_path / "tokenizer.model")
    with pytest.raises(InputError, match=r"--vocab_size 5: the text allows no less than \d+"):
        train_tokenizer(lambda: [words(2000)], 5, tmp_path / "tokenizer.model")
    assert not (tmp_path / "tokenizer.model").exists()


def test_tokens_are_written_once(stories, tmp_path, tokenizer):
    texts = tokenize([stories], (1, 0, 0), tokenizer, tmp_path / "tokens")
    expected = [i for story in STORIES for i in tokenizer.encode(story, bos=True, eos=False)]
    assert list(texts) == ["train"]
    assert texts["train"].ids.tolist() == expected
    assert isinstance(texts["train"].ids, np.memmap)
    assert texts["train"].n_bytes == sum(len(story) for story in STORIES)
    assert [expected[i] for i in texts["train"].starts] == [tokenizer.bos_id] * 3
    stories.unlink()
    again = tokenize([stories], (1, 0, 0), tokenizer, tmp_path / "tokens")
    assert again["train"].ids.tolist() == expected


@pytest.fixture
def text(tmp_path, tokenizer):
    """40 documents of 1 to 40 words."""
    documents = [words(n, seed=n).strip() for n in range(1, 41)]
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(documents))
    return tokenize([tmp_path / "a.txt"], (1, 0, 0), tokenizer, tmp_path / "tokens")["train"]


@pytest.mark.parametrize("offset", [0, 1, 7])
def test_training_rows_are_the_text_and_what_follows(text, offset):
    rows = TrainingRows(text, 8, offset)
    ids, seen = text.ids.tolist(), set()
    for i, (tokens, targets) in enumerate(rows):
        start = int(rows.starts[i])
        assert tokens.tolist() == ids[start : start + 8]
        assert targets.tolist() == ids[start + 1 : start + 9]
        seen.update(range(start, start + 9))
        if i + 1 == len(rows):
            break
    assert seen == set(range(len(ids)))
    assert set(text.starts[text.starts < len(ids) - 8]) <= set(rows.starts)


def test_evaluation_predicts_every_id_but_bos_once(text):
    rows = EvaluationRows(text, 8)
    predicted = []
    for i in range(len(rows)):
        tokens, targets = rows[i]
        n = int((targets != IGNORED).sum())
        start = int(rows.starts[i])
        assert tokens[:n].tolist() == text.ids[start : start + n].tolist()
        assert targets[:n].tolist() == text.ids[start + 1 : start + 1 + n].tolist()
        assert (targets[n:] == IGNORED).all()
        predicted += range(start + 1, start + 1 + n)
    assert sorted(predicted) == sorted(set(range(len(text))) - set(text.starts.tolist()))


def test_a_part_of_the_evaluation_is_spread_over_the_text(text):
    rows = EvaluationRows(text, 8, n_rows=5)
    everything = EvaluationRows(text, 8)
    assert len(rows) == 5
    assert (rows.starts[0], rows.starts[-1]) == (everything.starts[0], everything.starts[-1])


def test_a_context_longer_than_the_text_is_an_error(text):
    with pytest.raises(InputError, match="lower --max_seq_len"):
        TrainingRows(text, len(text), 0)
