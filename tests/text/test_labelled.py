"""Reading, cutting and batching labelled sentences."""

import json
from types import SimpleNamespace

import pytest
from torch.utils.data import DataLoader

from minllama.common.errors import InputError
from minllama.text.labelled import (
    Example,
    LlamaDataset,
    check_labels,
    collate,
    create_data,
    fit_context,
    load_label_names,
    make_loader,
    read_labelled,
)


@pytest.fixture
def file(tmp_path):
    def write(content):
        path = tmp_path / "x.txt"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_create_data_gives_sentences_labels_and_ids(file, tokenizer, capsys):
    path = file("2 ||| A Fine film . \n0 ||| a ||| b\n2 ||| \n")
    data, num_labels = create_data(path, tokenizer)
    assert num_labels == 2
    assert [row[:2] for row in data] == [("A Fine film .", 2), ("a ||| b", 0), ("", 2)]
    assert data[0][2] == tokenizer.encode("A Fine film .", bos=True, eos=True)
    assert data[2][2] == [1, 2]
    assert capsys.readouterr().out == f"load 3 data from {path}\n"

    rows = create_data(path, tokenizer, "valid", lower=True, eos=False, prompt_suffix="So? ")
    assert rows[0][0] == "a fine film . So? "
    assert rows[0][2] == tokenizer.encode("a fine film . So? ", bos=True, eos=False)


def test_windows_files_read_like_others(file):
    plain = read_labelled(file("1 ||| naïve\n0 ||| b\n"))
    assert read_labelled(file("\ufeff1 ||| naïve\r\n0 ||| b\r\n")) == plain


@pytest.mark.parametrize(
    ("content", "line", "expected"),
    [
        ("", 1, "empty file"),
        ("1 ||| good\nbad\n", 2, "label ||| sentence"),
        ("1 ||| good\n\n0 ||| bad\n", 2, "label ||| sentence"),
        ("1 ||| good\n0 |||\n", 2, "label ||| sentence"),
        ("good ||| 1\n", 1, "integer label"),
        ("1 ||| a\r\n2.0 ||| b\r\n", 2, "integer label"),
        (" ||| b\n", 1, "integer label"),
        (b"1 ||| ok\n1 ||| caf\xe9\n", 2, "UTF-8"),
        ("1 ||| a\n".encode("utf-16"), 1, "UTF-8"),
        ("0 ||| a\n3 ||| b\n", 2, "from 0 to 2 (names.json has 3 labels), found 3"),
        ("0 ||| a\n1 ||| b\n-1 ||| b\n", 3, "from 0 to 2"),
    ],
)
def test_bad_lines_are_named(file, content, line, expected):
    path = file(content)
    with pytest.raises(InputError) as error:
        check_labels(read_labelled(path), path, 3, "names.json")
    assert f"{path}, line {line}: " in str(error.value)
    assert expected in str(error.value)


def test_label_names(tmp_path):
    path = tmp_path / "names.json"
    path.write_text('["bad", "good"]')
    assert load_label_names(path) == ["bad", "good"]
    for wrong in ({"bad": 0}, ["good"], ["a", "a"], ["a", 3], ["a", " "], "ab"):
        path.write_text(json.dumps(wrong))
        with pytest.raises(InputError, match="two or more"):
            load_label_names(path)
    path.write_bytes(b"\xff[")
    with pytest.raises(InputError, match="not JSON"):
        load_label_names(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_label_names(tmp_path / "absent.json")


@pytest.fixture
def args(tokenizer_path):
    return SimpleNamespace(max_sentence_len=None, tokenizer_path=str(tokenizer_path))


@pytest.mark.parametrize("eos", [True, False])
def test_batches_are_padded_on_the_right(file, tokenizer, args, eos):
    path = file("1 ||| a film\n0 ||| the plot is thin\n")
    data, _ = create_data(path, tokenizer)
    dataset = LlamaDataset(data, args, eos)
    batch = dataset.collate_fn([dataset[0], dataset[1]])
    rows = [tokenizer.encode(s, bos=True, eos=eos) for s in ("a film", "the plot is thin")]
    width = max(map(len, rows))
    assert batch["token_ids"].tolist() == [row + [3] * (width - len(row)) for row in rows]
    assert batch["labels"].tolist() == [1, 0]
    assert batch["sents"] == ["a film", "the plot is thin"]
    assert set(batch) == {"token_ids", "labels", "sents"}
    encoded = [Example(*row[:2], ids) for row, ids in zip(data, rows, strict=True)]
    batch = collate(encoded, 3, with_lengths=True)
    assert batch.lengths.tolist() == [len(row) for row in rows]


def test_the_assignments_dataset_encodes_sentences_and_ours_keeps_ids(tokenizer, args):
    args.max_sentence_len = 2
    row = Example("the plot is thin", 1, [1, 9, 8, 7])
    whole = tokenizer.encode(row[0], bos=True, eos=False)
    dataset = LlamaDataset([row], args)
    assert dataset.collate_fn([row])["token_ids"].tolist() == [whole[:3]]
    (batch,) = make_loader([row], 1, tokenizer.pad_id, causal=False)
    assert batch.token_ids.tolist() == [[1, 9, 8, 7]]


def test_sentences_are_encoded_once(tokenizer, args, monkeypatch):
    dataset = LlamaDataset([("a film", 0, [])], args)
    calls = []
    encode = dataset.tokenizer.encode
    monkeypatch.setattr(
        dataset.tokenizer, "encode", lambda *a, **k: calls.append(a) or encode(*a, **k)
    )
    for _ in range(3):
        dataset.collate_fn([dataset[0]])
    assert len(calls) == 1


def test_works_in_a_shuffling_loader(file, tokenizer, args):
    path = file("".join(f"{i % 2} ||| film {i}\n" for i in range(10)))
    dataset = LlamaDataset(create_data(path, tokenizer)[0], args)
    loader = DataLoader(dataset, shuffle=True, batch_size=4, collate_fn=dataset.collate_fn)
    seen = [sentence for batch in loader for sentence in batch["sents"]]
    assert sorted(seen) == sorted(f"film {i}" for i in range(10))


def test_long_rows_keep_bos_and_one_end_with_one_warning():
    rows = [Example("a", 0, [1, 10, 11, 12, 13]), Example("b", 1, [1, 10, 11, 12])]
    with pytest.warns(UserWarning, match="2 of 3 rows") as warned:
        first = fit_context(rows, rows[:1], max_len=4, keep="first")
    assert len(warned) == 1
    assert [row[2] for row in first[0]] == [[1, 10, 11, 12], [1, 10, 11, 12]]
    with pytest.warns(UserWarning, match="their last 3 tokens"):
        (last,) = fit_context(rows, max_len=3, keep="last")
    assert [row[2] for row in last] == [[1, 12, 13], [1, 11, 12]]


def test_a_context_without_room_is_refused():
    with pytest.raises(InputError, match="no room"):
        fit_context([Example("a", 0, [1, 10])], max_len=1, keep="last")


@pytest.mark.filterwarnings("error")
def test_rows_that_fit_are_left_alone():
    rows = [Example("a", 0, [1, 10, 11])]
    assert fit_context(rows, max_len=3, keep="last") == [rows]


def test_more_names_than_a_model_tells_apart_are_refused_shortly(tmp_path):
    path = tmp_path / "names.json"
    path.write_text(json.dumps([f"label {i}" for i in range(100_000)]))
    with pytest.raises(InputError, match="100,000 names; --label-names takes 10,000") as error:
        load_label_names(path)
    assert len(str(error.value)) < 300
