"""The long series of runs: what is kept of them, and the table that they become."""

import itertools
import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

from common.errors import InputError
from experiments import measure, report, rows, runs, task_text
from experiments.baseline import baseline
from text.labelled import create_data, few_shot

FULL, FEW = 4_952_581, 1_285
EPOCH = {"train_loss": 1.0, "train_seconds": 2.0, "trained_parameters": FULL}


def line(accuracy: float, **more: object) -> str:
    record = {"accuracy": accuracy, "macro_f1": accuracy / 2, "peak_memory_bytes": 5}
    return json.dumps(record | more)


@pytest.fixture
def command(monkeypatch):
    """Stands in for the process; says what it was called with, and does what it is told."""
    calls = []

    def run(command, cwd, **_):
        calls.append([str(part) for part in command])
        Path(cwd, "metrics.jsonl").write_text("\n".join(call.lines))
        return SimpleNamespace(returncode=call.returncode, stderr=call.stderr, stdout=call.stdout)

    call = SimpleNamespace(calls=calls, lines=[], returncode=0, stderr="", stdout="")
    monkeypatch.setattr(runs.subprocess, "run", run)
    return call


def test_what_is_recorded_is_not_measured_again(tmp_path):
    results = tmp_path / "new/results.jsonl"
    measured = []

    def measure():
        measured.append(len(measured))
        return {"accuracy": measured[-1]}

    first = runs.recorded(results, {"name": "a", "flags": {"lr": 1e-3}}, measure)
    other = runs.recorded(results, {"name": "a", "flags": {"lr": 2e-3}}, measure)
    again = runs.recorded(results, {"name": "a", "flags": {"lr": 1e-3}}, measure)
    assert (first["accuracy"], other["accuracy"], again) == (0, 1, first)
    assert len(results.read_text().splitlines()) == 2


def test_a_measurement_that_fails_leaves_nothing(tmp_path, command):
    command.returncode, command.stderr = 2, "error: no such flag"
    results = tmp_path / "results.jsonl"
    with pytest.raises(InputError, match=r"^no such flag"):
        runs.recorded(results, {"name": "a"}, lambda: runs.classify("data/sst", {"lr": 1}))
    assert not results.exists()


def test_accuracies_are_those_of_the_predictions_after_the_epochs(command):
    command.lines = [line(0.1, **EPOCH), line(0.2, **EPOCH), line(0.3), line(0.4)]
    command.stdout = "alpha 0.5: dev acc :: 0.300\nkeep alpha 0.5\n"
    result = runs.classify("data/sst", {"causal": True, "wise_ft": [0, 0.5], "lr": 1e-3})
    assert result == {
        "dev": {"accuracy": 0.3, "macro_f1": 0.15},
        "test": {"accuracy": 0.4, "macro_f1": 0.2},
        "peak_memory_bytes": 5,
        "train_seconds": 4.0,
        "train_loss": [1.0, 1.0],
        "trained_parameters": FULL,
        "alpha": 0.5,
    }
    (called,) = command.calls
    start = called.index("--wise_ft")
    assert called[start : start + 5] == ["--wise_ft", "0", "0.5", "--lr", "0.001"]
    assert str(runs.ROOT / "data/sst-dev.txt") in called


def test_a_divergence_is_a_result_that_counts_as_none(command):
    command.returncode, command.stderr = 2, "error: the loss is nan; lower --lr"
    diverged = runs.classify("data/sst", {"lr": 1})
    records = [diverged, *({"dev": {"accuracy": a}} for a in (0.3, 0.4))]
    assert runs.spread(records, "dev") == "0.350 ± 0.071 (1 diverged)"
    assert runs.spread([diverged], "dev") == "(1 diverged)"


@pytest.mark.parametrize("name", rows.ROWS)
def test_a_row_takes_what_belongs_to_its_data(name):
    row = rows.ROWS[name]
    for data, n_labels in ((task_text.SST, 5), (task_text.CFIMDB, 2)):
        settings = row.settings(data, row.values[0], seed=7)
        assert settings["seed"] == 7
        assert settings["batch_size"] == row.flags.get("batch_size", {5: 80, 2: 10}[n_labels])
        assert row.tuned == "steps" or settings[row.tuned] == row.values[0]
        assert ("label-names" in settings) == ("prompt_based" in settings)
        assert settings.get("dtype") == (
            None if (name, data) == ("default", task_text.SST) else "bfloat16"
        )
        if "label-names" in settings:
            words = json.loads((runs.ROOT / settings["label-names"]).read_text())
            assert len(words) == n_labels


def test_the_cells_of_the_table_are_of_the_right_runs(tmp_path, monkeypatch):
    """Some of which diverge; the rounds of timing become slower."""
    rounds = itertools.count(1)

    def pretrain_on_tasks(corpus, steps, folder=None):
        if folder is not None:
            folder.mkdir()
            lines = '{"seconds": %.1f}\n{"test": {}}\n' % (10 * next(rounds))
            (folder / "metrics.jsonl").write_text(lines)
        return Path(f"{corpus}-{steps}")

    def classify(data, flags, model=runs.DEMO, option="finetune"):
        seed = flags.get("seed", 0)
        if flags.get("tune") == "head" and seed in (0, 3):  # a timed round, a final run
            return {"diverged": True}
        seconds = 1000.0  # is not what the table shows
        if data == "part of sst":
            assert flags["epochs"] == 1
            seconds = (seed + 1) * ({0: 40, 1: 20}[seed] if "mixout" in flags else 10)
        best = model.name == "sentences-500" or flags.get("lr") == 1e-3
        accuracy = {1337: 0.3 + 0.05 * best, 1: 0.5, 2: 0.6, 3: 0.7}.get(seed, 0.25)
        accuracy += 0.1 * flags.get("mixout", 0) + 0.2 * (Path(data).name == "cfimdb")
        return {
            "dev": {"accuracy": accuracy},
            "test": {"accuracy": accuracy - 0.1},
            "peak_memory_bytes": 2**30,
            "train_seconds": seconds,
            "trained_parameters": FEW if flags.get("tune") == "head" else FULL,
        }

    monkeypatch.setattr(measure, "pretrain_on_tasks", pretrain_on_tasks)
    monkeypatch.setattr(measure, "classify", classify)
    monkeypatch.setattr(
        measure,
        "baseline",
        lambda data, shots, seed: {
            "dev": {"accuracy": 0.4},
            "test": {"accuracy": 0.41},
            "trained_parameters": 100,
            "seconds": 3.0,
            "C": 1.0,
        },
    )
    monkeypatch.setattr(measure, "read_labelled", lambda path: [(0, "")] * 3000)
    monkeypatch.setattr(measure, "write_timed_part", lambda folder: "part of sst")
    monkeypatch.setattr(
        measure, "record", lambda *args: runs.recorded(tmp_path / "methods.jsonl", *args)
    )
    table = {cells[0]: cells[1:] for cells in report.make_table()}
    label = {name: row.label for name, row in rows.ROWS.items()}
    assert all(len(cells) + 1 == len(report.HEADER) for cells in table.values())
    plain = table[label["plain"]]
    assert plain[:3] == ["`lr` 0.0002, 0.0005, **0.001**", "0.600 ± 0.100", "0.500 ± 0.100"]
    assert plain[3:] == ["0.800 ± 0.100", f"{FULL:,}", "1.0", "1.0"]
    # 500 steps of 10 / 20 seconds, and 5 epochs of 3000 sentences, of which 1500 take 10 seconds
    assert table[label["continued"]][0] == "`steps` 250, **500**, 1000"
    assert table[label["continued"]][5] == f"{(250 + 100) / 100:.1f}"
    # those, and 1 epoch
    assert table[label["short"]][5] == f"{(250 + 20) / 100:.1f}"
    assert table[label["mixout"]][5] == "3.0"
    assert table[label["smart"]][0] == "`smart` 0.3"  # not tuned
    assert table[label["mixout"]][3] == "0.860 ± 0.100"  # among the best on SST-5
    assert table[label["head"]][1] == "0.550 ± 0.071 (1 diverged)"
    assert table[label["head"]][4:6] == [f"{FEW:,}", "1.0"]
    assert sum(bool(table[label[name]][3]) for name in rows.METHODS) == measure.N_BEST
    assert table[rows.BASELINE][1:] == ["0.400", "0.410", "0.400", "100", "3 s", ""]


def test_the_table_needs_no_run_that_is_not_recorded(monkeypatch):
    def run(*args, **settings):
        raise AssertionError(f"would run {args} {settings}")

    for name in ("classify", "baseline", "pretrain_on_tasks"):
        monkeypatch.setattr(measure, name, run)
    table = report.make_table()
    assert len(table) == len(rows.ROWS) + 2 + len(rows.PROMPTS)  # and two baselines
    assert all(cells[2] and cells[3] for cells in table)


def test_what_is_timed_comes_from_all_of_the_files(tmp_path, monkeypatch):
    for split in ("train", "dev", "test"):
        lines = [f"{i % 5} ||| {split} sentence {i}\n" for i in range(8000)]
        (tmp_path / f"all-{split}.txt").write_text("".join(lines))
    (tmp_path / "all-label-mapping.json").write_text("{}")
    monkeypatch.setattr(measure, "SST", str(tmp_path / "all"))
    data = measure.write_timed_part(str(tmp_path))
    lines = Path(f"{data}-train.txt").read_text().splitlines()
    assert len(lines) == 1500 and lines[-1] == "0 ||| train sentence 7495"
    assert len(Path(f"{data}-dev.txt").read_text().splitlines()) == 100
    assert Path(f"{data}-label-mapping.json").read_text() == "{}"


def test_the_baseline_sees_the_sentences_that_shots_draws(tmp_path, monkeypatch, tokenizer):
    draw = random.Random(0)
    for split in ("train", "dev", "test"):
        lines = [f"{draw.randrange(3)} ||| {split} sentence {i}\n" for i in range(60)]
        (tmp_path / f"toy-{split}.txt").write_text("".join(lines))
    data, _ = create_data(tmp_path / "toy-train.txt", tokenizer, "train", eos=False)
    expected = {sentence for sentence, *_ in few_shot(data, 4, 3, 5)}
    seen = []

    class Vectorizer(TfidfVectorizer):
        def fit(self, texts, y=None):
            seen.extend(texts)
            return super().fit(texts)

    monkeypatch.setattr("experiments.baseline.TfidfVectorizer", Vectorizer)
    baseline(str(tmp_path / "toy"), shots=4, seed=5)
    assert set(seen) == expected and len(seen) == 12
    seen.clear()
    baseline(str(tmp_path / "toy"), shots=4, seed=5, tokenizer=tokenizer)
    assert {tokenizer.decode(list(map(int, text.split()))) for text in seen} == expected


def test_the_baseline_learns_from_unlabelled_texts_what_words_are_alike(tmp_path, monkeypatch):
    """Words of dev are in no sentence of train, but beside its words in the unlabelled texts."""
    words = (["splendid", "lovely", "joyful"], ["dreadful", "dreary", "tedious"])
    for split, i in (("train", 0), ("dev", 1), ("test", 2)):
        lines = [f"{label} ||| a {words[label][i]} film\n" for label in (0, 1)] * 10
        (tmp_path / f"toy-{split}.txt").write_text("".join(lines))
    draw = random.Random(0)
    reviews = [
        " ".join(draw.choices(group, k=5) + draw.choices(list("abcdefgh"), k=5))
        for group in words
        for _ in range(100)
    ]
    monkeypatch.setattr("experiments.baseline.N_COMPONENTS", 6)
    data = str(tmp_path / "toy")
    assert baseline(data)["test"]["accuracy"] == 0.5
    assert baseline(data, unlabelled=reviews)["test"]["accuracy"] == 1


def test_the_text_of_the_tasks_ends_in_the_labels(tmp_path, monkeypatch):
    sst, cfimdb = str(tmp_path / "sst"), str(tmp_path / "cfimdb")
    (tmp_path / "sst-train.txt").write_text("4 ||| A joy .\n0 ||| No. 5 bores\n")
    (tmp_path / "cfimdb-train.txt").write_text("0 ||| Dr. No fails ! I left early . ...\n")
    words = dict(zip((sst, cfimdb), task_text.LABEL_WORDS.values(), strict=True))
    monkeypatch.setattr(task_text, "SST", sst)
    monkeypatch.setattr(task_text, "CFIMDB", cfimdb)
    monkeypatch.setattr(task_text, "LABEL_WORDS", words)
    assert sorted(task_text.task_text(labelled=True)) == [
        "0 ||| Dr. No fails ! It was bad\n",
        "0 ||| I left early . It was bad\n",
        "0 ||| No. 5 bores It was wrong\n",
        "4 ||| A joy . It was great\n",
    ]
    assert len(task_text.task_text(labelled=False)) == 3
