"""Fine-tuning loses nothing: whose file it is, going on, and what a run that has ended tells."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SENTENCES

import minllama.tasks.epoch
import minllama.tasks.finetune
from minllama.checkpoints.pt import read_checkpoint
from minllama.tasks.resuming import Claim, Keeper, Progress
from minllama.training.folder import locked

FLAGS = ["--option", "finetune", "--lr", "1e-2"]
WEIGHTS = "finetune-2-0.01.pt"


@pytest.fixture
def data(project):
    """Sentences of other lengths, and other data beside them."""
    for split, n in (("train", 21), ("dev", 9), ("test", 5)):
        lines = [f"{i % 3} ||| {SENTENCES[i % 6][: 12 + i]} .\n" for i in range(n)]
        Path(f"data/toy-{split}.txt").write_text("".join(lines))
        Path(f"data/other-{split}.txt").write_text("".join(lines[::-1]))
    project.flags[project.flags.index("--epochs") + 1] = "2"
    return project


def same(path: str, other: str) -> bool:
    a, b = read_checkpoint(path), read_checkpoint(other)
    states = [saved["optim"]["state"] for saved in (a, b)]
    return (
        a["model"].keys() == b["model"].keys()
        and all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
        and all(
            torch.equal(states[0][i]["exp_avg_sq"], states[1][i]["exp_avg_sq"]) for i in states[0]
        )
        and torch.equal(a["torch_rng"], b["torch_rng"])
    )


def files() -> set[str]:
    return {path.name for path in Path().iterdir()} - {"data", "model.pt", "tokenizer.model"}


def other_data(flags: list[str]) -> list[str]:
    return [
        flag.replace("data/toy-t", "data/other-t").replace("toy-dev", "other-dev") for flag in flags
    ]


def test_in_an_empty_folder_names_are_the_assignments(data, run_cli):
    code, out, err = run_cli(*FLAGS, *data.flags)
    assert (code, err) == (0, "")
    outputs = {f"toy-{split}-finetuning-output.txt" for split in ("dev", "test")}
    assert files() == {WEIGHTS, *outputs}
    assert f"save the model to {WEIGHTS}" in out


def test_weights_of_another_run_are_left_alone(data, run_cli):
    """Other data, another seed, and a file of which nobody knows whose it is."""
    assert run_cli(*FLAGS, *data.flags)[0] == 0
    first = Path(WEIGHTS).read_bytes()
    names = set()
    for flags in (other_data(data.flags), [*data.flags, "--seed", "5"]):
        code, out, err = run_cli(*FLAGS, *flags)
        assert code == 0
        name = re.fullmatch(rf"{WEIGHTS}: another run's; this one's weights: (\S+)\n", err)[1]
        assert re.fullmatch(r"finetune-2-0\.01-(toy|other)-[0-9a-f]{8}\.pt", name)
        assert f"load model from {name}" in out
        names.add(name)
        assert run_cli(*FLAGS, *flags)[2].endswith("has ended; --fresh trains anew\n")  # its own
    assert len(names) == 2 and Path(WEIGHTS).read_bytes() == first
    Path(WEIGHTS).write_bytes(b"mine")
    assert run_cli(*FLAGS, *data.flags, "--seed", "6")[0] == 0
    assert Path(WEIGHTS).read_bytes() == b"mine"


def test_runs_at_once_keep_apart_and_one_run_is_not_run_twice(data, run_cli):
    with locked(Path(f".{WEIGHTS}.lock")):  # as another run holds it, before its first epoch ends
        code, _, err = run_cli(*FLAGS, *data.flags)
    assert code == 0 and "another run's" in err and not Path(WEIGHTS).exists()
    (name,) = (path.name for path in Path().glob("finetune-*.pt"))
    digits = name.removesuffix(".pt")[-8:]
    with locked(Path(f".finetune-{digits}.lock")):
        code, _, err = run_cli(*FLAGS, *data.flags)
    assert (code, err) == (2, f"error: {WEIGHTS}: another process is at this very run\n")


METHODS = {
    "full": ["--hidden_dropout_prob", "0.3"],
    "causal": ["--causal", "--grad_accum", "2"],
    "lora": ["--tune", "lora", "--lora_dropout", "0.1"],
    "head": ["--tune", "head"],
    "norm": ["--tune", "norm"],
    "adapter": ["--tune", "adapter"],
    "prefix": ["--tune", "prefix"],
    "smart": ["--smart", "1"],
    "mixout": ["--mixout", "0.3"],
    "rates": ["--lr_schedule", "linear", "--warmup", "0.2", "--layer_decay", "0.8"],
    "wise": ["--wise_ft", "0.5", "1"],
    "prompt": ["--causal", "--prompt_based"],
    "few": ["--shots", "3", "--patience", "1"],
}


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_run_goes_on_to_the_same_weights(data, run_cli, monkeypatch, method):
    """Stopped within an epoch and behind one; the output is the same too."""
    flags = [*FLAGS, *data.flags, *METHODS[method]]
    code, whole, err = run_cli(*flags)
    assert code == 0, err
    (weights,) = Path().glob("finetune-*.pt")
    weights.rename("whole.pt")
    for name in sorted(files()):
        if name.endswith("output.txt"):
            Path(name).rename(f"whole-{name}")
    update, stop_at, steps = minllama.tasks.epoch.update, [3], []

    def stopping(*args):
        steps.append(1)
        if len(steps) == stop_at[0]:
            raise KeyboardInterrupt
        return update(*args)

    for at in (3, 4):
        steps.clear()
        stop_at[0] = at
        with monkeypatch.context() as patch:
            patch.setattr(minllama.tasks.epoch, "update", stopping)
            code = run_cli(*flags, "--save_every", "2")[0]
        if code == 0:  # few steps are all
            break
        assert code == 130 and list(Path().glob("finetune-*.state"))
    code, out, err = run_cli(*flags)
    assert code == 0
    assert re.search("continuing from epoch|has ended", err)
    without_memory = [re.sub("peak memory .*|args: .*", "", text) for text in (whole, out)]
    assert without_memory[0] == without_memory[1]
    assert same(str(weights), "whole.pt")
    for path in Path().glob("whole-*.txt"):
        assert path.read_bytes() == Path(path.name.removeprefix("whole-")).read_bytes()
    assert not list(Path().glob("*.state")) and not list(Path().glob(".*"))


def test_a_state_holds_no_frozen_weights(data, run_cli, monkeypatch):
    calls = []

    def stop(*args):
        calls.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(minllama.tasks.finetune.FineTuning, "finish", stop)
    assert run_cli(*FLAGS, *data.flags, "--tune", "lora")[0] == 130
    (folder,) = Path().glob("*.state")
    saved = read_checkpoint(folder / "state.pt")
    assert saved["model"] and not any("lora_" not in n and "head" not in n for n in saved["model"])


def test_losses_come_back_where_the_model_is():
    """Those that follow are there, and they become one tensor."""
    keeper = Keeper(Claim("w.pt", {}, fresh=False), torch.nn.Linear(1, 1, device="meta"), None, {})
    state = torch.get_rng_state()
    saved = {name: getattr(Progress(), name) for name in Progress.PLAIN}
    saved |= {"run": {}, "losses": [0.5, 0.25], "at_start.cpu": state, "now.cpu": state}
    keeper._take_up(saved, progress := Progress())
    assert [loss.device.type for loss in progress.losses] == ["meta", "meta"]


STATE_EDITS = {
    "losses": [["x"], [[1, 2]], [10**30], [0.5] * 1000],
    "records": ["x", [{"a": torch.ones(1)}]],
    "epoch": [-1, 10**9, 0.5],
    "at_start.cpu": [None, torch.zeros(3)],
    "now.cpu": [torch.zeros(torch.get_rng_state().shape, dtype=torch.uint8)],
    "run": [{}, torch.ones(0)],
    "step": [-3],
    "optimizer": [5],
}


def test_an_edited_state_is_one_line(data, run_cli, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(minllama.tasks.finetune.FineTuning, "finish", stop)
    assert run_cli(*FLAGS, *data.flags)[0] == 130
    (folder,) = Path().glob("*.state")
    saved = read_checkpoint(folder / "state.pt")
    edits = [(key, value) for key, values in STATE_EDITS.items() for value in values]
    step = {i: {**values, "step": -3} for i, values in saved["optimizer"]["state"].items()}
    edits.append(("optimizer", {**saved["optimizer"], "state": step}))
    groups = [{**group, "betas": [5]} for group in saved["optimizer"]["param_groups"]]
    edits.append(("optimizer", {**saved["optimizer"], "param_groups": groups}))
    for key, value in edits:
        torch.save(saved | {key: value}, folder / "state.pt")
        code, _, err = run_cli(*FLAGS, *data.flags)
        assert code == 2 and err.count("\n") == 1 and folder.name in err, (key, value, err)


def test_an_edited_end_is_one_line_and_harms_no_other_run(data, run_cli):
    assert run_cli(*FLAGS, *data.flags)[0] == 0
    saved = read_checkpoint(WEIGHTS)
    for value in ("x", 5, "[5]", "[" * 100_000):
        torch.save(saved | {"records": value}, WEIGHTS)
        code, _, err = run_cli(*FLAGS, *data.flags)
        assert code == 2 and err.count("\n") == 1 and "--fresh trains anew" in err
    torch.save(saved | {"run": "[" * 100_000}, WEIGHTS)
    code, _, err = run_cli(*FLAGS, *data.flags)
    assert code == 0 and "another run's" in err


def test_a_run_that_has_ended_is_told_again(data, run_cli):
    flags = [*FLAGS, *data.flags, "--metrics_out", "metrics.jsonl"]
    _, first, err = run_cli(*flags)
    assert err == ""
    lines = Path("metrics.jsonl").read_text().splitlines()
    code, again, err = run_cli(*flags)
    assert (code, again) == (0, first)
    assert err == f"{WEIGHTS}: has ended; --fresh trains anew\n"
    added = Path("metrics.jsonl").read_text().splitlines()[len(lines) :]
    assert [json.loads(line)["split"] for line in added] == ["dev", "test"]  # epochs only once
    before = Path(WEIGHTS).stat().st_mtime_ns
    _, fresh, err = run_cli(*flags, "--fresh")
    assert (fresh.splitlines()[1:], err) == (first.splitlines()[1:], "")
    assert Path(WEIGHTS).stat().st_mtime_ns > before


@pytest.mark.skipif(sys.platform == "win32", reason="kills with a signal")
def test_a_kill_at_any_file_operation_loses_nothing(data):
    """At four of them, all kinds; tests.campaign takes every one."""
    flags = [*FLAGS, *data.flags, "--save_every", "3"]
    n = run_until(0, flags, "whole")
    rng = random.Random(0)
    for i, at in enumerate(sorted(rng.sample(range(1, n + 1), 4))):
        run_until(at, flags, f"k{i}")
        run_until(0, flags, f"k{i}")
        assert same(f"k{i}/{WEIGHTS}", f"whole/{WEIGHTS}"), at
        names = {path.name for path in Path(f"k{i}").iterdir()}
        assert names == {path.name for path in Path("whole").iterdir()}, at


def run_until(n: int, flags: list[str], folder: str) -> int:
    """Run in a folder until the n-th operation; with 0 to the end. Returns how many there were."""
    Path(folder).mkdir(exist_ok=True)
    flags = [f"../{flag}" if Path(flag).is_file() else flag for flag in flags]
    command = [sys.executable, "-m", "tests.file_operations", str(n), str(ROOT / "run_llama.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *flags], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == (-9 if n else 0), done.stderr
    return 0 if n else int(done.stderr.splitlines()[-1])
