"""Documents, splits, tokenizers and rows of ids for pre-training."""

import json
import random

import numpy as np
import pytest

from minllama.common.errors import InputError
from minllama.text.plain import (
    IGNORED,
    EvaluationRows,
    TrainingRows,
    encode_chunk,
    measure,
    read_chunks,
    split_chunks,
    tokenize,
    train_tokenizer,
)
from tokenizer import Tokenizer

STORIES = [
    "One day a fox met a hen .\nThe hen ran home .",
    "A boy had a red ball — “très” 猫 .",
    "The sun was warm and the sea was blue , and nobody wanted to go home .",
]


@pytest.fixture
def stories(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text("\n<|endoftext|>\n".join(STORIES) + "\n<|endoftext|>\n")
    return path


def words(n: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(("a", "bc", "dé", "ghij", "\nk", "l  m")) for _ in range(n)).strip()


def split(paths, shares=(0.7, 0.15, 0.15)):
    return list(split_chunks(paths, shares, measure(paths)))


def test_documents_stand_between_separators(stories):
    assert list(read_chunks(stories)) == [(story, True) for story in STORIES]


def test_a_file_without_separators_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("\n first line\n\nsecond line \n")
    assert list(read_chunks(tmp_path / "a.txt")) == [("first line\n\nsecond line", True)]


def test_the_sentences_of_a_labelled_file_are_documents(tmp_path):
    (tmp_path / "a.txt").write_text("1 ||| good film\n0 ||| bad film\n")
    assert list(read_chunks(tmp_path / "a.txt")) == [("good film", True), ("bad film", True)]


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
def test_chunks_of_a_document_have_its_ids(tmp_path, tokenizer, text):
    (tmp_path / "a.txt").write_text(text)
    chunks = list(read_chunks(tmp_path / "a.txt", size=50))
    assert len(chunks) > 10
    assert [begins for _, begins in chunks] == [True] + [False] * (len(chunks) - 1)
    assert "".join(chunk for chunk, _ in chunks) == text
    ids = [i for chunk, begins in chunks for i in encode_chunk(tokenizer, chunk, begins)]
    assert ids == tokenizer.encode(text, bos=True, eos=False)


def test_a_text_without_spaces_is_read_in_chunks_too(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(["猫犬鳥魚"] * 1_000_000))
    sizes = [len(chunk) for chunk, _ in read_chunks(tmp_path / "a.txt")]
    assert len(sizes) == 5 and max(sizes) < 1.1 * (1 << 20)
    (tmp_path / "a.txt").write_text("x" * 5_000_000)
    assert max(len(chunk) for chunk, _ in read_chunks(tmp_path / "a.txt")) <= 3 * (1 << 20)


def test_text_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc\xff\xfe")
    with pytest.raises(InputError, match=r"a\.txt: not UTF-8"):
        list(read_chunks(tmp_path / "a.txt"))


def test_documents_stay_whole_when_there_are_several(tmp_path):
    documents = [words(20, seed) for seed in range(100)]
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(documents))
    parts = {"train": [], "validation": [], "test": []}
    for part, text, begins in split([tmp_path / "a.txt"]):
        assert begins
        parts[part].append(text)
    assert [text for part in parts.values() for text in part] == documents
    total = sum(len(document.encode()) for document in documents)
    for part, share in zip(parts.values(), (0.7, 0.15, 0.15), strict=True):
        assert sum(len(text.encode()) for text in part) / total == pytest.approx(share, abs=0.02)


def test_a_single_document_is_cut_by_its_length(tmp_path):
    text = words(5000)
    (tmp_path / "a.txt").write_text(text)
    parts = {"train": "", "validation": "", "test": ""}
    begun = []
    for part, chunk, begins in split([tmp_path / "a.txt"]):
        parts[part] += chunk
        begun += [part] * begins
    assert "".join(parts.values()) == text
    assert begun == ["train", "validation", "test"]
    for part, share in zip(parts.values(), (0.7, 0.15, 0.15), strict=True):
        assert len(part.encode()) / len(text.encode()) == pytest.approx(share, abs=0.003)


def test_a_part_that_would_be_empty_is_an_error(stories, tmp_path):
    with pytest.raises(InputError, match="nothing for validation"):
        split([stories], (0.98, 0.01, 0.01))
    assert {part for part, *_ in split([stories], (1, 0, 0))} == {"train"}
    (tmp_path / "empty.txt").write_text(" \n<|endoftext|>\n\n")
    with pytest.raises(InputError, match="no text"):
        measure([tmp_path / "empty.txt"])


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
    assert tokenizer.decode(tokenizer.encode("dé\nghij", bos=True, eos=False)) == "dé\nghij"


def test_a_vocabulary_that_the_text_cannot_support_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"--vocab_size 5000: the text allows at most \d+"):
        train_tokenizer(lambda: [words(2000)], 5000, tmp_path / "tokenizer.model")
    with pytest.raises(InputError, match=r"--vocab_size 5: the text allows no less than \d+"):
        train_tokenizer(lambda: [words(2000)], 5, tmp_path / "tokenizer.model")
    assert not (tmp_path / "tokenizer.model").exists()


def test_tokens_are_written_once(stories, tmp_path, tokenizer):
    measured = measure([stories])
    texts = tokenize([stories], (1, 0, 0), measured, tokenizer, tmp_path / "tokens")
    expected = [i for story in STORIES for i in tokenizer.encode(story, bos=True, eos=False)]
    assert list(texts) == ["train"]
    assert texts["train"].ids.tolist() == expected
    assert isinstance(texts["train"].ids, np.memmap)
    assert texts["train"].n_bytes == sum(len(story.encode()) for story in STORIES)
    assert texts["train"].n_unknown == 0  # bytes stand for what the tokenizer does not know
    assert [expected[i] for i in texts["train"].starts] == [tokenizer.bos_id] * 3
    del texts  # Windows writes to no file that is mapped
    saved = (tmp_path / "tokens/train.bin").read_bytes()
    assert saved == np.array(expected, np.uint16).tobytes()
    (tmp_path / "tokens/train.bin").write_bytes(saved[:-2])  # damaged, so it is made again
    tokenize([stories], (1, 0, 0), measured, tokenizer, tmp_path / "tokens")
    assert (tmp_path / "tokens/train.bin").read_bytes() == saved
    (tmp_path / "tokens/train.bin").write_bytes(saved[:-2] + saved[:2])  # other ids, as many
    tokenize([stories], (1, 0, 0), measured, tokenizer, tmp_path / "tokens")
    assert (tmp_path / "tokens/train.bin").read_bytes() == saved
    stories.unlink()
    again = tokenize([stories], (1, 0, 0), measured, tokenizer, tmp_path / "tokens")
    assert again["train"].ids.tolist() == expected


@pytest.mark.parametrize(
    "text", ["", "[" * 100_000, "[]", '{"files": 1}', '{"train": {"n_tokens": -1}}', "{}", None]
)
def test_a_damaged_index_is_made_again(stories, tmp_path, tokenizer, text):
    folder = tmp_path / "tokens"
    before = tokenize([stories], (1, 0, 0), None, tokenizer, folder)["train"].ids.tolist()
    if text is None:
        text = (folder / "index.json").read_text().replace("n_bytes", "bytes")
    (folder / "index.json").write_text(text)
    assert tokenize([stories], (1, 0, 0), None, tokenizer, folder)["train"].ids.tolist() == before


def test_tokens_of_another_tokenizer_are_refused(stories, tmp_path, tokenizer):
    tokenize([stories], (1, 0, 0), None, tokenizer, tmp_path / "tokens")
    train_tokenizer(lambda: [words(2000, seed=1)], 280, tmp_path / "other.model")
    other = Tokenizer(tokenizer_model=tmp_path / "other.model")
    with pytest.raises(InputError, match=r"other\.model: not the tokenizer that made .*/tokens;"):
        tokenize([stories], (1, 0, 0), None, other, tmp_path / "tokens")


def test_where_documents_start_is_written_once(tmp_path, tokenizer, monkeypatch):
    documents = [words(n, seed=n) for n in range(1, 41)]
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(documents))
    paths, shares, folder = [tmp_path / "a.txt"], (0.7, 0.15, 0.15), tmp_path / "tokens"
    tokenize(paths, shares, measure(paths), tokenizer, folder)
    lengths = [len(tokenizer.encode(document, bos=True, eos=False)) for document in documents]
    starts, n_before = [], 0
    for name in ("train", "validation", "test"):
        saved = np.frombuffer((folder / f"{name}.starts.bin").read_bytes(), "<i8").tolist()
        starts += [n_before + start for start in saved]
        n_before += (folder / f"{name}.bin").stat().st_size // 2
    assert starts == [sum(lengths[:i]) for i in range(40)]
    monkeypatch.setattr("minllama.text.plain._find", None)  # is not called
    text = tokenize(paths, shares, None, tokenizer, folder)["train"]
    assert isinstance(text.starts, np.memmap)
    monkeypatch.undo()
    before = text.starts.tolist()
    del text
    saved = (folder / "train.starts.bin").read_bytes()
    (folder / "train.starts.bin").unlink()  # as version 0.1 leaves a folder
    index = json.loads((folder / "index.json").read_bytes())
    del index["files"], index["tokenizer"]
    (folder / "index.json").write_text(json.dumps(index))
    assert tokenize(paths, shares, None, tokenizer, folder)["train"].starts.tolist() == before
    assert not (folder / "train.starts.bin").exists()
    (folder / "train.starts.bin").write_bytes(saved[:-8])  # damaged, so it is made again
    tokenize(paths, shares, None, tokenizer, folder)
    assert (folder / "train.starts.bin").read_bytes() == saved


def test_unknown_characters_are_counted(tmp_path):
    text = words(2000)
    with pytest.warns(UserWarning):
        train_tokenizer(lambda: [text], 20, tmp_path / "tokenizer.model")
    tokenizer = Tokenizer(tokenizer_model=tmp_path / "tokenizer.model")
    (tmp_path / "a.txt").write_text("a 猫 bc ö ghij")
    paths = [tmp_path / "a.txt"]
    texts = tokenize(paths, (1, 0, 0), measure(paths), tokenizer, tmp_path / "tokens")
    assert texts["train"].n_unknown == 2


def test_large_vocabularies_take_four_bytes(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "n_words", 70_000)
    (tmp_path / "a.txt").write_text(words(50))
    paths = [tmp_path / "a.txt"]
    texts = tokenize(paths, (1, 0, 0), measure(paths), tokenizer, tmp_path / "tokens")
    assert texts["train"].ids.dtype == np.uint32
    assert texts["train"].ids.tolist() == tokenizer.encode(words(50), bos=True, eos=False)


@pytest.fixture
def text(tmp_path, tokenizer):
    """40 documents of 1 to 40 words."""
    documents = [words(n, seed=n) for n in range(1, 41)]
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(documents))
    paths = [tmp_path / "a.txt"]
    return tokenize(paths, (1, 0, 0), measure(paths), tokenizer, tmp_path / "tokens")["train"]


@pytest.mark.parametrize("offset", [0, 1, 7])
def test_training_rows_are_the_text_and_what_follows(text, offset):
    rows = TrainingRows(text, 8, offset)
    ids, seen = text.ids.tolist(), set()
    starts = [rows.start_of(i) for i in range(len(rows))]
    for i, start in enumerate(starts):
        tokens, targets = rows[i]
        assert tokens.tolist() == ids[start : start + 8]
        assert targets.tolist() == ids[start + 1 : start + 9]
        seen.update(range(start, start + 9))
    assert seen == set(range(len(ids)))
    ends = [*text.starts[1:], len(ids)]
    expected = [start for start in text.starts if offset]
    for start, end in zip(text.starts, ends, strict=True):
        expected += range(start + offset, end, 8)
    assert starts == [min(start, len(ids) - 9) for start in expected]


def test_evaluation_predicts_every_id_but_bos_once(text):
    rows = EvaluationRows(text, 8)
    predicted = []
    for i in range(len(rows)):
        tokens, targets = rows[i]
        n = int((targets != IGNORED).sum())
        start, end = rows.bounds_of(i)
        assert end == start + n + 1
        assert tokens[:n].tolist() == text.ids[start : start + n].tolist()
        assert targets[:n].tolist() == text.ids[start + 1 : start + 1 + n].tolist()
        assert (targets[n:] == IGNORED).all()
        predicted += range(start + 1, start + 1 + n)
    assert predicted == sorted(set(range(len(text))) - set(text.starts.tolist()))


def test_a_part_of_the_evaluation_is_spread_over_the_text(text):
    everything = [EvaluationRows(text, 8).bounds_of(i) for i in range(len(EvaluationRows(text, 8)))]
    rows = EvaluationRows(text, 8, n_rows=5)
    last = len(everything) - 1
    assert [rows.bounds_of(i) for i in range(len(rows))] == [
        everything[i * last // 4] for i in range(5)
    ]


def test_rows_of_a_huge_document_take_no_memory():
    """Two billion rows: one number for each would be 16 GB."""
    n_tokens = 1 << 40

    class Huge:
        starts = np.zeros(1, np.int64)

        def __len__(self):
            return n_tokens

    rows, scored = TrainingRows(Huge(), 512, 5), EvaluationRows(Huge(), 512, 3)
    assert len(rows) == n_tokens // 512 + 1
    assert [rows.start_of(i) for i in (0, 1, 2, 2_000_000_000)] == [0, 5, 517, 5 + 512 * 1999999999]
    assert rows.start_of(len(rows) - 1) == n_tokens - 513
    assert [scored.bounds_of(i)[0] for i in (0, 2)] == [0, n_tokens - 512]
