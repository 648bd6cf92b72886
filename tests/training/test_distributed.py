"""Several processes: real ones, over gloo, against one."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PROJECT_FLAGS, ROOT, SENTENCES, assert_refused, make_project

from minllama.checkpoints.pt import read_checkpoint
from minllama.common.errors import InputError
from minllama.training import distributed

TEXT = ["--option", "pretrain", "--text", "text.txt", "--vocab_size", "300", "--dim", "16"]
TEXT += ["--n_layers", "2", "--n_heads", "2", "--max_seq_len", "16"]
FINETUNE = ["--option", "finetune", "--hidden_dropout_prob", "0", "--lr", "1e-2", *PROJECT_FLAGS]
SEVEN_ROWS = [*TEXT, "--batch_size", "7", "--grad_accum", "2", "--steps", "20"]
SEVEN_ROWS += ["--eval_every", "10", "--output_dir", "out"]
DROPOUT = [*TEXT, "--batch_size", "4", "--steps", "15", "--eval_every", "5", "--dropout", "0.1"]
LONGER = [*TEXT, "--batch_size", "4", "--min_lr", "1e-3", "--warmup_steps", "5"]
LONGER += ["--eval_every", "5"]
PLAIN = [*FINETUNE, "--causal", "--metrics_out", "plain.jsonl"]
LORA = [*FINETUNE, "--tune", "lora", "--grad_accum", "2", "--metrics_out", "lora.jsonl"]
INTERRUPTED = ["--option", "finetune", *PROJECT_FLAGS, "--epochs", "4", "--lr", "1e-3", "--causal"]
INTERRUPTED += ["--save_every", "2", "--skip_train_eval", "--metrics_out", "interrupted.jsonl"]


def torchrun(n: int, *arguments: object) -> subprocess.Popen:
    """Start a program in n processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(n)]
    command += ["--standalone", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)


def several_runs(n: int, *runs: list) -> tuple[int, str, str]:
    """Run tests/training/several_runs.py; returns exit code, standard output and error."""
    process = torchrun(n, ROOT / "tests/training/several_runs.py", json.dumps(runs))
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def write_files(folder: Path, tokenizer_path: Path) -> None:
    """A project whose last batch has two sentences, and a text."""
    make_project(folder, tokenizer_path)
    lines = [f"{i % 3} ||| {SENTENCES[i % 6][: 9 + i]} .\n" for i in range(10)]
    (folder / "data/toy-train.txt").write_text("".join(lines))
    documents = (f"{SENTENCES[i % 6]}, said {i % 7} of {i % 11}.\n" for i in range(200))
    (folder / "text.txt").write_text("<|endoftext|>\n".join(documents))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tokenizer_path, run_once) -> SimpleNamespace:
    """The folders of runs in one, two and three processes, and what these printed."""
    folders = {
        n: tmp_path_factory.mktemp(name) for n, name in ((1, "one"), (2, "two"), (3, "three"))
    }
    for folder in folders.values():
        write_files(folder, tokenizer_path)
    run_once(folders[1], *SEVEN_ROWS)
    printed = {1: (folders[1] / "printed.txt").read_text()}
    for flags in (PLAIN, LORA):
        run_once(folders[1], *flags)
    run_once(folders[1], *LONGER, "--steps", "40", "--output_dir", "whole")
    run_once(folders[2], *LONGER, "--steps", "10", "--output_dir", "many")
    in_two = [
        [0, *SEVEN_ROWS, "--shard"],
        [0, *LORA, "--shard"],
        *([stop, *DROPOUT, "--output_dir", "resumed"] for stop in (7, 6, 0)),
        [0, *DROPOUT, "--output_dir", "whole"],
        [0, *LONGER, "--output_dir", "many", "--steps", "20"],
        [0, *LONGER, "--output_dir", "many", "--steps", "30", "--shard"],
        *([stop, *INTERRUPTED, *more] for stop, more in ((0, []), (6, ["--fresh"]), (0, []))),
    ]
    with pytest.MonkeyPatch.context() as patch:
        for n, each in ((2, in_two), (3, [[0, *SEVEN_ROWS], [0, *PLAIN]])):
            patch.chdir(folders[n])
            code, printed[n], err = several_runs(n, *each)
            assert code == 0, err
    return SimpleNamespace(folders=folders, printed=printed)


def reports(path: Path) -> list[float]:
    """The losses of all splits at every report."""
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    splits = ("train", "validation", "test")
    return [record[split]["loss"] for record in records for split in splits if split in record]


def weights(path: Path) -> torch.Tensor:
    tensors = read_checkpoint(path)["model"]
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


@pytest.mark.parametrize("n", [2, 3])
def test_pretraining_does_not_depend_on_the_number_of_processes(runs, n):
    """Seven rows for three processes are 2, 2 and 3; two processes share the model's shards."""
    one, many = runs.folders[1] / "out", runs.folders[n] / "out"
    assert len(reports(one)) == 2 * 2 + 1
    assert reports(many) == pytest.approx(reports(one), abs=1e-5)
    assert {p.name for p in many.iterdir()} == {p.name for p in one.iterdir()}
    varying = re.compile(r"\| [\d,]+ tokens/s.*|args:.*|.*parameters on.*")
    ours, theirs = (varying.sub("", runs.printed[n]) for n in (n, 1))
    assert ours.startswith(theirs)  # one voice, with the same words


@pytest.mark.parametrize(("n", "name"), [(2, "lora"), (3, "plain")])
def test_finetuning_does_not_depend_on_the_number_of_processes(runs, n, name):
    """In three processes the last batch, of two sentences, leaves nothing for one of them."""
    results = []
    for folder in (runs.folders[1], runs.folders[n]):
        record = json.loads((folder / f"{name}.jsonl").read_text().splitlines()[0])
        results.append((record["train_loss"], record["dev_accuracy"]))
    assert results[1] == pytest.approx(results[0], abs=1e-5)
    kind = "advanced" if name == "lora" else "finetuning"
    for split in ("dev", "test"):
        output = f"toy-{split}-{kind}-output.txt"
        ours, theirs = (folder / output for folder in (runs.folders[n], runs.folders[1]))
        assert ours.read_bytes() == theirs.read_bytes()


def test_an_interrupted_run_ends_with_the_same_weights(runs):
    """Each process draws the dropout that it would have drawn."""
    resumed, whole = (runs.folders[2] / name for name in ("resumed", "whole"))
    assert runs.printed[2].count(" in resumed\n") == 2
    assert reports(resumed) == reports(whole)
    assert torch.equal(weights(resumed / "model.pt"), weights(whole / "model.pt"))


def test_interrupted_finetuning_ends_with_the_same_losses(runs):
    """After a whole run, the same one is interrupted in its second epoch, and resumed."""
    lines = (runs.folders[2] / "interrupted.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "epoch" in record]
    assert [record["epoch"] for record in records] == [0, 1, 2, 3] * 2
    losses = [record["train_loss"] for record in records]
    assert losses[:4] == losses[4:]


def test_a_run_continues_in_another_number_of_processes(runs, tmp_path, monkeypatch, run_cli):
    """1, 2, 2 with shards and 1 give the losses of one process."""
    shutil.copytree(runs.folders[2], tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    assert read_checkpoint("many/state.pt")["step"] == 30
    assert run_cli(*LONGER, "--output_dir", "many", "--steps", "40")[0] == 0
    assert reports(Path("many")) == pytest.approx(reports(runs.folders[1] / "whole"), abs=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"1": ["--lr", "0.5"]}, r"lr is 0\.001 on rank 0, but 0\.5 on rank 1.*"),
        ({"1": ["--lr", "x"]}, r"rank 1 on .*--lr.*"),
    ],
)
def test_an_error_is_printed_once_whichever_process_has_it(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("a text. " * 500)
    code, out, err = several_runs(2, [0, *TEXT, "--output_dir", "out", flags])
    assert code != 0 and out.count("args:") == 1
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert re.fullmatch(f"error: {message}", line)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("WORLD_SIZE", value) for value in ("", "0", "-2", "two")),
        *(("RANK", value) for value in (None, "", "2", "x")),
        *(("MASTER_PORT", value) for value in (None, "70000", "x")),
    ],
)
def test_an_environment_of_no_processes_is_refused_by_the_variables_name(
    monkeypatch, run_cli, name, value
):
    together = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "29511"} | {name: value}
    for variable, text in together.items():
        monkeypatch.delenv(variable, raising=False)
        if text is not None:
            monkeypatch.setenv(variable, text)
    assert_refused(run_cli(), f"{name} is", "torchrun")


def test_a_port_that_is_taken_is_refused(monkeypatch, run_cli):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        together = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for variable, text in together.items():
            monkeypatch.setenv(variable, text)
        assert_refused(run_cli(), f"127.0.0.1:{port}: the port is taken")


def test_more_processes_than_gpus_are_refused(monkeypatch):
    together = {"WORLD_SIZE": "3", "RANK": "0", "LOCAL_RANK": "2", "MASTER_PORT": "29511"}
    for variable, text in together.items():
        monkeypatch.setenv(variable, text)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="2 GPUs"), distributed.process_group():
        pass


def test_one_process_has_nothing_to_shard(tmp_path, monkeypatch, run_cli):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("<|endoftext|>\n".join(f"{line}.\n" for line in SENTENCES * 20))
    code, _, err = run_cli(*TEXT, "--steps", "2", "--shard")
    assert code == 0 and err.count("\n") == 1 and "--shard" in err


@pytest.mark.parametrize("seed", [7, 2**32 - 1])
def test_processes_draw_apart_and_then_alike(monkeypatch, seed):
    device, draws, after = torch.device("cpu"), [], []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for rank, step in ((0, 1), (1, 1), (0, 2), (0, 1)):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        torch.manual_seed(5)
        with distributed.rank_rng(seed, step, device):
            draws.append(torch.rand(3).tolist())
        after.append(torch.rand(3).tolist())
    assert draws[0] == draws[3] and draws[0] != draws[1] != draws[2] != draws[0]
    torch.manual_seed(5)
    assert after == [torch.rand(3).tolist()] * 4
