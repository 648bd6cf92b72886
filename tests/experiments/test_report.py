"""The report: which results are kept, and the table that they become."""

import itertools
import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments import measure, report, rows, runs, task_text
from experiments.baseline import baseline

FULL, FEW = 4_952_581, 1_285


def test_results_are_recorded_and_not_measured_again(tmp_path):
    """Until flags or the demo model change; a failed run leaves no record."""
    results, numbers = tmp_path / "new/results.jsonl", itertools.count()

    def result(lr, demo):
        identity = {"flags": {"lr": lr}, "demo": demo}
        return runs.recorded(results, identity, lambda: {"accuracy": next(numbers)})["accuracy"]

    runs_of = [(1e-3, "one"), (2e-3, "one"), (1e-3, "one"), (1e-3, "two")]
    assert [result(*run) for run in runs_of] == [0, 1, 0, 2]
    with pytest.raises(ZeroDivisionError):
        runs.recorded(results, {"name": "b"}, lambda: {"accuracy": 1 / 0})
    assert len(results.read_text().splitlines()) == 3


def test_accuracies_are_those_of_the_predictions_after_the_epochs(monkeypatch):
    def run_command(command, cwd):
        start = command.index("--wise_ft")
        assert command[start : start + 5] == ["--wise_ft", "0", "0.5", "--lr", "0.001"]
        epoch = {"train_loss": 1.0, "train_seconds": 2.0, "trained_parameters": FULL}
        records = [{"accuracy": 0.1} | epoch, {"accuracy": 0.2} | epoch]
        records += [{"accuracy": 0.3}, {"accuracy": 0.4}]
        shared = {"macro_f1": 0.5, "peak_memory_bytes": 5}
        lines = [json.dumps(record | shared) for record in records]
        Path(cwd, "metrics.jsonl").write_text("\n".join(lines))
        return SimpleNamespace(stdout="alpha 0.5: dev acc :: 0.300\nkeep alpha 0.5\n")

    monkeypatch.setattr(runs, "run_command", run_command)
    result = runs.classify("data/sst", {"causal": True, "wise_ft": [0, 0.5], "lr": 1e-3})
    assert result == {
        "dev": {"accuracy": 0.3, "macro_f1": 0.5},
        "test": {"accuracy": 0.4, "macro_f1": 0.5},
        "peak_memory_bytes": 5,
        "train_seconds": 4.0,
        "train_loss": [1.0, 1.0],
        "trained_parameters": FULL,
        "alpha": 0.5,
    }


def test_a_diverged_run_counts_and_has_no_accuracy(project):
    data = str(project.path / "data/toy")
    model = project.path / "model.pt"
    flags = {"lr": 1e9, "epochs": 1, "tokenizer-path": project.path / "tokenizer.model"}
    diverged = runs.classify(data, flags, model)
    records = [diverged, *({"dev": {"accuracy": a}} for a in (0.3, 0.4))]
    assert runs.describe(records, "dev") == "0.350 ± 0.071 (1 diverged)"
    assert runs.describe([diverged], "dev") == "(1 diverged)"


def classify_by_seed(data, flags, model=runs.DEMO, option="finetune"):
    """Stands in for a run: seed 1337 finds 1e-4 best, and other seeds differ in their accuracy."""
    seed = flags.get("seed", 0)
    if flags.get("tune") == "head" and seed in (0, 3):  # a timed round, a final run
        return {"diverged": True}
    seconds = 1000.0  # not in the table
    if data == "sample":
        assert flags["epochs"] == 1
        seconds = (seed + 1) * ({0: 40, 1: 20, 2: 30}[seed] if "mixout" in flags else 10)
    accuracy = {1337: 0.3 + 0.05 * (flags.get("lr") == 1e-4), 1: 0.5, 2: 0.6, 3: 0.7}.get(seed, 0.2)
    accuracy += 0.2 * (Path(data).name == "cfimdb") + 0.02 * (model.name == "adapted")
    return {
        "dev": {"accuracy": accuracy},
        "test": {"accuracy": accuracy - 0.1},
        "peak_memory_bytes": 2**30,
        "train_seconds": seconds,
        "trained_parameters": FEW if flags.get("tune") == "head" else FULL,
    }


def test_the_cells_of_the_table_are_of_the_right_runs(tmp_path, monkeypatch):
    """Some runs diverge; the rounds of timing become slower."""
    rounds = itertools.count(1)

    def pretrain_on_tasks(corpus, steps, reviews_mb, folder=None):
        if folder is not None:
            folder.mkdir()
            lines = '{"seconds": %.1f}\n{"test": {}}\n' % (10 * next(rounds))
            (folder / "metrics.jsonl").write_text(lines)
        return Path("adapted" if reviews_mb else "other")

    stand_ins = {
        "RECORDS": tmp_path / "methods.jsonl",
        "pretrain_on_tasks": pretrain_on_tasks,
        "adapted_model": lambda reviews_mb: Path("adapted" if reviews_mb else "demo"),
        "classify": classify_by_seed,
        "read_labelled": lambda path: [(0, "")] * 3000,
        "write_sample": lambda *_: "sample",
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(measure, name, stand_in)
    times = measure.relative_times()
    names = ("plain", "continued", "short", "mixout", "smart", "head", "reader mean", "zero-shot")
    table = {name: report.cells_of(name, times.get(name))[1:] for name in names}
    plain = table["plain"]
    assert plain[:3] == ["`lr` **0.0001**, 0.0002, 0.0005", "0.600 ± 0.100", "0.500 ± 0.100"]
    assert plain[3:] == ["0.800 ± 0.100", f"{FULL:,}", "1.0", "1.0"]
    # 250 steps of 10 / 20 seconds, and 5 epochs of 3000 sentences, of which 1500 take 10 seconds
    assert table["continued"][0] == "`steps` 250"
    assert table["continued"][5] == f"{(125 + 100) / 100:.1f}"
    assert table["short"][5] == f"{(125 + 40) / 100:.1f}"  # those, and 2 epochs
    assert table["mixout"][5] == "3.0"
    assert table["smart"][0] == "`smart` 0.3"
    assert table["head"][1] == "0.550 ± 0.071 (1 diverged)"
    assert table["head"][4:6] == [f"{FEW:,}", "1.0"]
    assert table["reader mean"][1:4] == ["0.620 ± 0.100", "0.520 ± 0.100", "0.820 ± 0.100"]
    assert table["zero-shot"] == ["", "0.200", "0.100", "0.400", "0", "", ""]


def test_the_documented_table_is_that_of_the_records(monkeypatch):
    """All records are of this demo model, and `results/README.md` shows them as they are."""

    def run(*args, **settings):
        raise AssertionError(f"would run {args} {settings}")

    for name in ("classify", "baseline", "pretrain_on_tasks", "adapted_model"):
        monkeypatch.setattr(measure, name, run)
    records = [json.loads(line) for line in measure.RECORDS.read_text().splitlines()]
    assert {record["demo"] for record in records} == {measure.demo_fingerprint()}
    shown = {}
    for text in (runs.RESULTS / "README.md").read_text().splitlines():
        label, *cells = [cell.strip() for cell in text.strip("|").split("|")]
        shown[label] = cells
    times = measure.relative_times()
    for name in rows.ROWS:
        label, *cells = report.cells_of(name, times.get(name))
        assert shown[label] == cells, name


def test_a_sample_is_evenly_spaced_and_has_the_longest_sentence(tmp_path):
    for split in ("train", "dev", "test"):
        lines = [f"{i % 5} ||| {split} sentence {i}\n" for i in range(8000)]
        lines[77] = "3 ||| a much longer sentence than all others\n"
        (tmp_path / f"all-{split}.txt").write_text("".join(lines))
    (tmp_path / "all-label-mapping.json").write_text("{}")
    n_lines = {"train": 1601, "dev": 3, "test": 101}
    sample = runs.write_sample(f"{tmp_path}/all", str(tmp_path), n_lines, min_words=10)
    lines = Path(f"{sample}-train.txt").read_text().splitlines()
    assert len(lines) == 1601 and lines[0].startswith("3 ||| a much longer sentence")
    assert lines[-1] == "0 ||| " + " ".join(["train sentence 7995"] * 4)
    assert Path(f"{sample}-dev.txt").read_text().splitlines()[1].startswith("0 ||| dev sentence")
    assert Path(f"{sample}-label-mapping.json").read_text() == "{}"


def test_the_baseline_learns_similar_words_from_unlabelled_texts(tmp_path, monkeypatch):
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
