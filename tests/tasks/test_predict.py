"""`--option predict`: the labels are those of an evaluation, in order, as lines arrive."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from minllama.tasks.predict import groups

FINETUNE = ["--option", "finetune", "--lr", "1e-2"]
SENTENCES = "sentences.txt"


@pytest.fixture
def data(project):
    """Sentences of many lengths, with and without their labels."""
    for split, n in (("train", 12), ("dev", 40), ("test", 6)):
        lines = [f"{i % 3} ||| {'a warm and funny film ' * (i % 3 + 1)}{i} .\n" for i in range(n)]
        Path(f"data/toy-{split}.txt").write_text("".join(lines))
    lines = Path("data/toy-dev.txt").read_text().splitlines()
    Path(SENTENCES).write_text("".join(line.partition(" ||| ")[2] + "\n" for line in lines))
    return project


def predicted(path: str) -> list[int]:
    return [int(line.partition(" ||| ")[0]) for line in Path(path).read_text().splitlines()]


@pytest.mark.parametrize(
    "method", [[], ["--causal", "--pooling", "mean"], ["--causal", "--prompt_based"]]
)
def test_labels_are_those_of_the_evaluation(data, run_cli, method):
    assert run_cli(*FINETUNE, *data.flags, *method)[0] == 0
    (weights,) = Path().glob("finetune-*.pt")
    (evaluated,) = Path().glob("toy-dev-*-output.txt")
    code, out, err = run_cli("--option", "predict", "--load", str(weights), "--input", SENTENCES)
    assert (code, err) == (0, "")
    rows = [line.split("\t") for line in out.splitlines()]
    assert [int(label) for label, _, _ in rows] == predicted(evaluated)
    names = json.loads(Path("data/toy-label-mapping.json").read_text())
    assert all(name == names[int(label)] for label, name, _ in rows)
    assert all(1 / 3 <= float(probability) <= 1 for _, _, probability in rows)


@pytest.mark.parametrize("flags", [["--causal"], ["--causal", "--calibrate", "pmi"], []])
def test_zero_shot_labels_are_those_of_prompting(data, run_cli, flags):
    """Without a mask they depend on the batch, so one batch holds all sentences."""
    if not flags:
        flags = ["--batch_size", "64"]
    model = data.flags[:4]
    assert run_cli("--option", "prompt", *data.flags, *flags)[0] == 0
    (evaluated,) = Path().glob("toy-dev-*-output.txt")
    names = ["--label-names", "data/toy-label-mapping.json", "--input", SENTENCES]
    code, out, _ = run_cli("--option", "predict", *model, *names, *flags, "--format", "jsonl")
    assert code == 0
    assert [json.loads(line)["label"] for line in out.splitlines()] == predicted(evaluated)


def test_formats_agree_and_files_are_written_whole(data, run_cli):
    flags = ["--option", "predict", *data.flags[:4], "--causal", "--input", SENTENCES]
    flags += ["--label-names", "data/toy-label-mapping.json"]
    rows = {}
    for form in ("text", "jsonl", "csv"):
        code, out, _ = run_cli(*flags, "--format", form, "--output", f"out.{form}")
        assert (code, out) == (0, "")
        rows[form] = Path(f"out.{form}").read_text()
    table = list(csv.DictReader(io.StringIO(rows["csv"])))
    records = [json.loads(line) for line in rows["jsonl"].splitlines()]
    lines = [line.split("\t") for line in rows["text"].splitlines()]
    assert len(table) == len(records) == len(lines) == 40
    for row, record, (label, name, probability) in zip(table, records, lines, strict=True):
        assert (int(row["label"]), row["name"]) == (record["label"], record["name"])
        assert (int(label), name) == (record["label"], record["name"])
        assert float(row["probability"]) == record["probability"]
        assert abs(float(probability) - record["probability"]) <= 5e-5
    Path("bad.txt").write_bytes(b"good\n\xff\n")
    before = Path("out.text").read_bytes()
    code, _, err = run_cli(*flags, "--input", "bad.txt", "--output", "out.text")
    assert (code, err) == (2, "error: bad.txt, line 2: not UTF-8 text; save it as UTF-8\n")
    assert Path("out.text").read_bytes() == before
    code, _, err = run_cli(*flags, "--output", SENTENCES)
    assert code == 2 and "would overwrite the input" in err


def test_lines_of_a_pipe_are_labelled_as_they_arrive(data):
    """Empty lines too. Standard output has nothing but the labels."""
    command = [sys.executable, ROOT / "run_llama.py", "--option", "predict", *data.flags[:4]]
    command += ["--causal", "--label-names", "data/toy-label-mapping.json", "--batch_size", "2"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ
    )
    process.stdin.write("a warm film\n\n")
    process.stdin.flush()
    first = [process.stdout.readline() for _ in range(2)]
    assert all(line.count("\t") == 2 for line in first)
    for _ in range(3):  # no line waits for another
        process.stdin.write("one more\n")
        process.stdin.flush()
        assert process.stdout.readline().count("\t") == 2
    rest, _ = process.communicate("the last")
    assert process.returncode == 0 and rest.count("\n") == 1


def test_groups_are_all_lines_that_have_arrived_or_full_batches():
    reads = [["a"] * n for n in (1, 3, 500, 1)]
    sizes = [len(some) for some in groups(reads, 2, full_batches=False)]
    assert sizes == [1, 3, 200, 200, 100, 1]
    sizes = [len(some) for some in groups(reads, 2, full_batches=True)]
    assert sizes == [4, 200, 200, 100, 1]


def test_the_sentences_are_not_overwritten_through_standard_input(data):
    command = [sys.executable, ROOT / "run_llama.py", "--option", "predict", *data.flags[:4]]
    command += ["--causal", "--label-names", "data/toy-label-mapping.json"]
    before = Path(SENTENCES).read_bytes()
    with open(SENTENCES) as stdin:
        done = subprocess.run(
            [*command, "--output", SENTENCES], stdin=stdin, capture_output=True, text=True
        )
    assert done.returncode == 2 and "would overwrite the input" in done.stderr
    nowhere = {"stdin": subprocess.DEVNULL, "capture_output": True}
    assert subprocess.run([*command, "--output", "/dev/null"], **nowhere).returncode == 0
    assert Path(SENTENCES).read_bytes() == before
