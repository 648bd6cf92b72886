"""Reading, checking, tokenizing and truncating labelled sentences."""

import json
import warnings

import pytest

from minllama.common.errors import InputError
from minllama.text.batches import Example
from minllama.text.labelled import (
    check_labels,
    create_data,
    few_shot,
    fit_context,
    load_label_names,
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
    assert [example[:2] for example in data] == [("A Fine film .", 2), ("a ||| b", 0), ("", 2)]
    assert data[0][2] == tokenizer.encode("A Fine film .", bos=True, eos=True)
    assert data[2][2] == [1, 2]
    assert capsys.readouterr().out == f"load 3 data from {path}\n"

    data = create_data(path, tokenizer, "valid", lower=True, eos=False, prompt_suffix="So? ")
    assert data[0][0] == "a fine film . So? "
    assert data[0][2] == tokenizer.encode("a fine film . So? ", bos=True, eos=False)


@pytest.mark.parametrize(
    ("content", "line", "expected"),
    [
        ("", 1, "label ||| sentence"),
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


@pytest.mark.parametrize(
    "names",
    [
        *({"bad": 0}, ["good"], ["a", "a"], ["a", 3], ["a", " "], ["a", "b\nc"], "ab"),
        [f"label {i}" for i in range(100_000)],
    ],
)
def test_bad_label_names_are_refused_in_a_short_message(tmp_path, names):
    path = tmp_path / "names.json"
    path.write_text('["bad", "good"]')
    assert load_label_names(path) == ["bad", "good"]
    path.write_text(json.dumps(names))
    with pytest.raises(InputError, match="expected a JSON list of 2 to 10,000") as error:
        load_label_names(path)
    assert len(str(error.value)) < 300


def test_label_names_that_cannot_be_read(tmp_path):
    (tmp_path / "names.json").write_bytes(b"\xff[")
    with pytest.raises(InputError, match="not JSON"):
        load_label_names(tmp_path / "names.json")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_label_names(tmp_path / "absent.json")


def test_long_sentences_keep_bos_and_one_end_with_one_warning():
    long, longer = Example("b", 1, [1, 10, 11, 12]), Example("a", 0, [1, 10, 11, 12, 13])
    with pytest.warns(UserWarning, match="2 of 3 sentences") as warned:
        train, dev = fit_context([long, longer], [longer], max_len=4, keep="first")
    assert len(warned) == 1
    assert train == [long, Example("a", 0, [1, 10, 11, 12])] and dev == train[1:]
    with pytest.warns(UserWarning, match="their last 3 tokens"):
        (last,) = fit_context([long, longer], max_len=3, keep="last")
    assert [example.ids for example in last] == [[1, 11, 12], [1, 12, 13]]
    with pytest.raises(InputError, match="no room"):
        fit_context([long], max_len=1, keep="last")
    with warnings.catch_warnings(action="error"):
        assert fit_context([long], max_len=4, keep="last") == [[long]]


def test_few_shots_are_so_many_of_each_label():
    data = [Example(str(i), i % 3, [i]) for i in range(30)]
    chosen = few_shot(data, 4, 3, seed=1)
    assert sorted(example.label for example in chosen) == [0] * 4 + [1] * 4 + [2] * 4
    assert chosen == few_shot(data, 4, 3, seed=1) != few_shot(data, 4, 3, seed=2)
    with pytest.raises(InputError, match="label 0 has 10 sentences"):
        few_shot(data, 11, 3, seed=1)
