"""Files of token ids: one sequence, split by position, checked and measured as it is read."""

import itertools

import numpy as np
import pytest

import minllama.text.token_files
from minllama.common.errors import InputError
from minllama.text.sequences import TrainingSequences
from minllama.text.token_files import open_token_files

DOCUMENTS = ["The hen ran home .", "A boy — “très” 猫 .\n\nIt ended .", "a", "two hours  and more"]
DOCUMENTS *= 25
N_BYTES = sum(len(document.encode()) for document in DOCUMENTS)


@pytest.fixture
def ids(tokenizer) -> list[int]:
    return [i for text in DOCUMENTS for i in tokenizer.encode(text, bos=True, eos=False)]


@pytest.fixture
def paths(tmp_path, ids) -> list:
    """The ids in four files, one of them of a single id."""
    cuts = (0, 700, 701, 1500, len(ids))
    paths = [tmp_path / f"{i}.bin" for i in range(4)]
    for path, (start, end) in zip(paths, itertools.pairwise(cuts), strict=True):
        np.array(ids[start:end], "<u2").tofile(path)
    return [str(path) for path in paths]


@pytest.fixture
def small_samples(monkeypatch):
    monkeypatch.setattr(minllama.text.token_files, "N_BLOCKS", 5)
    monkeypatch.setattr(minllama.text.token_files, "BLOCK", 10)


def test_several_files_are_one_sequence_split_by_position(paths, ids, tokenizer):
    (text,) = open_token_files(paths, (1, 0, 0), tokenizer).values()
    assert len(text) == len(ids)
    for start, end in [(0, 5), (695, 705), (699, 1501), (700, 701), (0, len(ids)), (3, 3)]:
        assert text[start:end].tolist() == ids[start:end]
    assert text[len(ids) - 3 : len(ids) + 9].tolist() == ids[-3:]
    for shares, cuts in [((0.5, 0.3, 0.2), (0.5, 0.8)), ((3, 0, 1), (0.75, 0.75))]:
        first, second = (round(cut * len(ids)) for cut in cuts)
        expected = {"train": ids[:first], "validation": ids[first:second], "test": ids[second:]}
        splits = open_token_files(paths, shares, tokenizer)
        assert {name: split[:].tolist() for name, split in splits.items()} == {
            name: part for name, part in expected.items() if part
        }


@pytest.mark.parametrize("end", [[1], [2], [2, 1]])
def test_ends_of_texts_have_no_bytes(tmp_path, tokenizer, end):
    ids = [1] if 1 in end else []
    for document in DOCUMENTS:
        ids += tokenizer.encode(document, bos=False, eos=False) + end
    np.array(ids, "<u2").tofile(tmp_path / "a.bin")
    files = open_token_files([tmp_path / "a.bin"], (1, 0, 0), tokenizer)["train"]
    n_bytes = N_BYTES
    if 1 not in end:  # the first id is not predicted, so it is not measured
        n_bytes += 1 - len(tokenizer.sp_model.id_to_piece(ids[0]).replace("▁", " "))
    assert files.n_bytes == n_bytes
    assert files.n_sampled == sum(i != 1 for i in ids[1:])


def test_of_many_ids_evenly_spaced_blocks_are_measured(tmp_path, tokenizer, small_samples):
    whole_pieces = [i for i in range(320) if not tokenizer.sp_model.is_byte(i)]
    ids = np.random.default_rng(0).choice(whole_pieces, 1011)
    ids.astype("<u2").tofile(tmp_path / "a.bin")
    files = open_token_files([tmp_path / "a.bin"], (1, 0, 0), tokenizer)["train"]
    n_bytes = n_tokens = n_unknown = 0
    for block in range(5):
        for i in range(1 + block * 250, 11 + block * 250):
            piece = tokenizer.sp_model.id_to_piece(int(ids[i]))
            n_tokens += ids[i] != 1
            n_unknown += ids[i] == 0
            n_bytes += ids[i] == 0
            if ids[i] > 2:
                n_bytes += len(piece.replace("▁", " ").encode())
                n_bytes -= piece.startswith("▁") and ids[i - 1] in (1, 2)
    assert (files.n_sampled, files.n_bytes, files.n_unknown) == (n_tokens, n_bytes, n_unknown)
    assert files.tokens_per_byte == n_tokens / n_bytes


def test_an_id_outside_the_vocabulary_is_found_when_it_is_read(tmp_path, tokenizer, small_samples):
    ids = np.full((2, 1000), 300, "<u2")
    ids[1, 200:203] = 319, 320, 400
    paths = [tmp_path / "0.bin", tmp_path / "1.bin"]
    for path, row in zip(paths, ids, strict=True):
        row.tofile(path)
    text = open_token_files(paths, (1, 0, 0), tokenizer)["train"]  # its sample has none
    sequences = TrainingSequences(text, 20, 0)
    assert sequences[59][1].tolist() == [300] * 19 + [319]
    with pytest.raises(InputError, match=r"1\.bin: id 400, but the tokenizer has 320 pieces"):
        sequences[60]


def test_large_vocabularies_take_four_bytes(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "n_words", 70_000)
    np.array([1, 300, 301], "<u4").tofile(tmp_path / "a.bin")
    text = open_token_files([tmp_path / "a.bin"], (1, 0, 0), tokenizer)["train"]
    assert text[:].tolist() == [1, 300, 301]
    (tmp_path / "a.bin").write_bytes(bytes(4 * 10 + 2))
    with pytest.raises(InputError, match=r"a\.bin: no ids of 4 bytes each"):
        open_token_files([tmp_path / "a.bin"], (1, 0, 0), tokenizer)
