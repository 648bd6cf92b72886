"""Several processes: real ones, over gloo, against one."""

import contextlib
import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SENTENCES

from minllama.checkpoints.pt import read_checkpoint
from minllama.common.errors import InputError
from minllama.training import distributed, state

TEXT = ["--option", "pretrain", "--text", "text.txt", "--vocab_size", "300", "--dim", "16"]
TEXT += ["--n_layers", "2", "--n_heads", "2", "--max_seq_len", "16"]
LOSSES = ("train", "validation", "test")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a text."""
    monkeypatch.chdir(tmp_path)
    lines = (f"{SENTENCES[i % 6]}, said {i % 7} of {i % 11}.\n" for i in range(600))
    (tmp_path / "text.txt").write_text("<|endoftext|>\n".join(lines))
    return tmp_path


def start(
    n: int, *flags: str, each: dict | None = None, only: int | None = None, **environment: str
) -> list[subprocess.Popen]:
    """Start `run_llama.py` in n processes, as `torchrun` would.

    Args:
        each: by process more flags.
        only: the process that is started; the others are not.
    """
    together = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1"}
    together |= {"MASTER_PORT": str(free_port())}
    together |= {"LOCAL_WORLD_SIZE": str(n), "PYTHONPATH": str(ROOT), **environment}
    processes = []
    for rank in range(n) if only is None else [only]:
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), **together} if n > 1 else {}
        processes.append(
            subprocess.Popen(
                [sys.executable, str(ROOT / "run_llama.py"), *flags, *(each or {}).get(rank, [])],
                env=os.environ | own,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes


def ends(processes: list) -> tuple[list[int], str, str]:
    """The exit codes of all processes, and what they printed together."""
    printed = [process.communicate(timeout=100) for process in processes]
    out, err = ("".join(column) for column in zip(*printed, strict=True))
    return [process.returncode for process in processes], out, err


def together(n: int, *flags: str, **more) -> str:
    """Run to the end; returns standard output."""
    codes, out, err = ends(start(n, *flags, **more))
    assert codes == [0] * n, err
    return out


def free_port() -> int:
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def losses(path) -> list[float]:
    records = [json.loads(line) for line in (Path(path) / "metrics.jsonl").read_text().splitlines()]
    return [record[part]["loss"] for record in records for part in LOSSES if part in record]


def weights(path) -> torch.Tensor:
    tensors = read_checkpoint(path)["model"]
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def test_pretraining_does_not_depend_on_the_number_of_processes(folder):
    flags = [*TEXT, "--batch_size", "6", "--grad_accum", "2", "--steps", "100"]
    outputs = [together(1, *flags, "--output_dir", "one")]
    outputs += [together(4, *flags, "--output_dir", "four")]  # six rows: 1, 2, 1, 2
    outputs += [together(2, *flags, "--output_dir", "parts", "--shard")]
    assert len(losses("one")) == 41
    for name in ("four", "parts"):
        assert losses(name) == pytest.approx(losses("one"), abs=1e-5)
        assert {path.name for path in Path(name).iterdir()} == {
            *("model.pt", "metrics.jsonl", "pretrain.json", "tokenizer.model", "tokens"),
            "state-100",
        }
        # Each of a hundred steps rounds otherwise, and Adam makes much of tiny gradients.
        assert (weights(f"{name}/model.pt") - weights("one/model.pt")).abs().max() < 1e-3
    speeds = re.compile(r"\| [\d,]+ tokens/s.*|args:.*|in \d processes|cpu.*")
    same = {speeds.sub("", output) for output in outputs}
    assert len(same) == 1  # one voice, with the same words


def test_a_run_goes_on_in_another_number_of_processes(folder):
    """1 → 2 → 2 in parts → 4 → 1 gives the losses of one process; each part ends at a report."""
    flags = [*TEXT, "--batch_size", "4", "--steps", "50", "--eval_every", "10"]
    together(1, *flags, "--output_dir", "one")
    flags += ["--output_dir", "many"]
    for part, (n, more) in enumerate([(1, []), (2, []), (2, ["--shard"]), (4, []), (1, [])]):
        processes = start(n, *flags, *more)
        begin = time.monotonic()
        while part < 4 and newest_step("many") < 10 * (part + 1):
            assert time.monotonic() < begin + 60 and processes[0].poll() is None
            time.sleep(0.002)
        if part < 4:
            for process in processes:
                process.kill()
        codes, out, err = ends(processes)
        if part > 0:
            assert re.search(r"continuing from step \d0 in many", out), err
    assert codes == [0]
    assert losses("many") == pytest.approx(losses("one"), abs=1e-5)
    states = [path.name for path in Path("many").glob("*state*")]
    assert states == ["state.pt"]


def newest_step(folder: str) -> int:
    """The step of the state in a folder, which may be changing."""
    with contextlib.suppress(OSError, InputError):
        found = state.newest(Path(folder))
        if found is not None and found.is_dir():
            return int(found.name.split("-")[1])
        return 0 if found is None else read_checkpoint(found)["step"]
    return 0


def test_torchrun_restarts_a_killed_process_and_the_run_ends_the_same(folder):
    flags = [*TEXT, "--batch_size", "4", "--steps", "60", "--eval_every", "10", "--dropout", "0.1"]
    launcher = [sys.executable, "-m", "minllama.training.distributed", "--nproc_per_node", "2"]
    launcher += ["--max_restarts", "1", "--master_port", str(free_port())]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for name in ("whole", "killed"):
        command = [*launcher, str(ROOT / "run_llama.py"), *flags, "--output_dir", name]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        while name == "killed" and newest_step(name) < 20:
            assert process.poll() is None
            time.sleep(0.01)
        if name == "killed":
            listed = subprocess.run(
                ["pgrep", "-f", f"run_llama.py.*--output_dir {name}", "-P", str(process.pid)],
                capture_output=True,
                text=True,
            )
            os.kill(int(listed.stdout.split()[-1]), signal.SIGKILL)
        out, _ = process.communicate(timeout=100)
        assert process.returncode == 0
    assert "continuing from step" in out
    assert losses("killed") == losses("whole")  # dropout too draws what it would have drawn


FINETUNE = ["--option", "finetune", "--hidden_dropout_prob", "0", "--lr", "1e-2"]


def test_finetuning_does_not_depend_on_the_number_of_processes(project):
    """In four processes the last batch, of three rows, leaves nothing for one of them."""
    lines = [f"{i % 3} ||| {SENTENCES[i % 6][: 9 + i]} .\n" for i in range(11)]
    Path("data/toy-train.txt").write_text("".join(lines))
    cases = [(4, ["--causal"]), (2, ["--shard", "--tune", "lora", "--grad_accum", "2"])]
    for n, more in cases:
        files = []
        for processes, flags in ((1, [flag for flag in more if flag != "--shard"]), (n, more)):
            metrics = f"metrics-{processes}.jsonl"
            for leftover in (Path(metrics), *Path().glob("*output.txt")):
                leftover.unlink(missing_ok=True)
            together(processes, *FINETUNE, *project.flags, *flags, "--metrics_out", metrics)
            record = json.loads(Path(metrics).read_text().splitlines()[0])
            outputs = [path.read_bytes() for path in sorted(Path().glob("*output.txt"))]
            files.append((record["train_loss"], record["dev_accuracy"], outputs))
        assert files[1][0] == pytest.approx(files[0][0], abs=1e-5)
        assert files[1][1:] == files[0][1:] and len(files[0][2]) == 2


def test_an_error_is_told_once_whichever_process_has_it(folder):
    """The second process misses the text; nothing of it is left behind."""
    flags = [*TEXT, "--output_dir", "out"]
    codes, out, err = ends(start(2, *flags, each={1: ["--text", "other.txt"]}))
    assert codes == [2, 2] and out.count("args:") == 1
    assert err.startswith("error: text is ") and err.count("\n") == 1
    assert not Path("out").exists()
    codes, out, err = ends(start(2, *flags, "--lr", "x"))
    assert codes == [2, 2] and out == ""
    assert err == "error: argument --lr: invalid float value: 'x'; --help lists all flags\n"
    model = ["--pretrained-model-path", str(ROOT / "data/demo/model.pt")]
    codes, out, err = ends(start(2, "--option", "generate", *model))
    assert (
        codes == [2, 2]
        and err == "error: --option generate: runs in one process; leave torchrun out\n"
    )


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(("end", "code"), [("pass", 0), ("sys.exit()", 0), ("sys.exit(2)", 2)])
def test_one_of_several_processes_ends_at_once_with_its_code(n, end, code):
    """What Python would do at its end is left out, but for what is still to be written."""
    program = f"""if True:
        import atexit, sys
        from minllama.training import distributed
        atexit.register(print, "the end")
        with distributed.ending_at_once():
            print("done")
            {end}
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT), "WORLD_SIZE": str(n)}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert result.returncode == code
    assert result.stdout == ("done\nthe end\n" if n == 1 else "done\n")


def test_the_launcher_ends_with_the_exit_code_and_one_line(folder):
    command = [sys.executable, "-m", "minllama.training.distributed", "--nproc_per_node", "2"]
    command += ["--master_port", str(free_port()), str(ROOT / "run_llama.py"), *TEXT]
    Path("text.txt").write_text("")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert result.returncode == 2
    assert result.stderr == "error: text.txt: no text in it; name a file that has some\n"


def test_ctrl_c_ends_the_launcher_with_one_line(folder):
    command = [sys.executable, "-m", "minllama.training.distributed", "--nproc_per_node", "2"]
    command += ["--master_port", str(free_port()), str(ROOT / "run_llama.py"), *TEXT]
    command += ["--output_dir", "out", "--steps", "100000", "--eval_every", "10"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while newest_step("out") < 10:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130
    assert err == "interrupted; the same command continues from the last report\n"


def test_a_process_that_is_alone_says_so(folder):
    codes, _, err = ends(start(2, *TEXT, only=0, MINLLAMA_TIMEOUT="2"))
    assert codes == [2] and err.count("\n") == 1
    assert re.match(r"error: process 0 of 2 .* could not reach the others at 127.0.0.1:\d+", err)


def test_a_wrong_start_is_one_line(monkeypatch):
    monkeypatch.setenv("MINLLAMA_TIMEOUT", "soon")
    with pytest.raises(InputError, match="MINLLAMA_TIMEOUT=soon: not a number of seconds"):
        distributed._connect(0, 2)
    monkeypatch.delenv("MINLLAMA_TIMEOUT")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="number 3 of its machine, which has 2 GPUs"):
        distributed._connect(2, 3)


def test_one_process_has_nothing_to_share_out(folder):
    out = ends(start(1, *TEXT, "--steps", "2", "--shard"))
    assert out[0] == [0]
    assert out[2] == "--shard: there is one process, so that it gains nothing\n"


def test_methods_that_need_the_whole_model_are_refused(project, run_cli, monkeypatch):
    monkeypatch.setattr(distributed, "n_processes", lambda: 2)
    monkeypatch.setattr(distributed, "agree", lambda _: None)
    for given, name in ((["--tune", "prefix"], "--tune prefix"), (["--smart", "1"], "--smart")):
        code, _, err = run_cli(*FINETUNE, *project.flags, "--shard", *given)
        assert code == 2
        assert err == f"error: --shard: does not go with {name}; leave one of them out\n"


@pytest.mark.parametrize(("n_rows", "n"), [(6, 4), (3, 4), (1, 4), (8, 2), (7, 3)])
def test_shares_are_the_batch(monkeypatch, n_rows, n):
    rows, counted = torch.arange(n_rows), []
    monkeypatch.setattr(distributed, "n_processes", lambda: n)
    for rank in range(n):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        (share,), counts = distributed.share(rows)
        assert 1 <= len(share) <= n_rows // n + 1
        counted += share.tolist() if counts else []
    assert counted == rows.tolist()


@pytest.mark.parametrize(("n_batches", "n"), [(6, 4), (3, 4), (8, 2), (0, 2)])
def test_rounds_share_out_all_batches_in_order(monkeypatch, n_batches, n):
    results, seen = [], []
    monkeypatch.setattr(distributed, "n_processes", lambda: n)
    for rank in range(n):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        rounds = list(distributed.rounds(range(n_batches)))
        results.append([batch for _, batch, counts in rounds if counts])
        seen.append([batch for group, _, _ in rounds for batch in group])
        assert len(rounds) == -(-n_batches // n)  # as many for each
    assert seen == [list(range(n_batches))] * n
    monkeypatch.setattr(distributed, "gathered_objects", lambda _: results)
    assert distributed.in_rounds([]) == list(range(n_batches))


@pytest.mark.parametrize("seed", [7, 2**32 - 1])
def test_processes_draw_apart_and_then_alike(monkeypatch, seed):
    device, draws, after = torch.device("cpu"), [], []
    monkeypatch.setattr(distributed, "n_processes", lambda: 2)
    for rank, step in ((0, 1), (1, 1), (0, 2), (0, 1)):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        torch.manual_seed(5)
        with distributed.own_draws(seed, step, device):
            draws.append(torch.rand(3).tolist())
        after.append(torch.rand(3).tolist())
    assert draws[0] == draws[3] and draws[0] != draws[1] != draws[2] != draws[0]
    torch.manual_seed(5)
    assert after == [torch.rand(3).tolist()] * 4


def test_a_full_disk_is_one_line_and_leaves_no_part_of_a_state(folder):
    """The limit is met within a tensor; nothing but a state is as large."""
    resource = pytest.importorskip("resource")
    processes = start(2, *TEXT, "--dim", "512", "--output_dir", "out")
    for process in processes:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (4 << 20, 4 << 20))
    codes, _, err = ends(processes)
    assert codes == [2, 2]
    assert re.fullmatch(r"error: .*\.state-0\.tmp: .*\n", err)
    assert not list(Path("out").glob("*state*"))


def test_a_damaged_state_is_named(tmp_path):
    (tmp_path / "state-3").mkdir()
    (tmp_path / "state-3" / state.VALUES).write_text('{"val')
    with pytest.raises(InputError, match=r"state-3: not a state of this run \(JSONDecodeError"):
        state.load(tmp_path, torch.nn.Linear(1, 1), None, {}, dict)


def test_the_index_of_a_checkpoint_runs_no_code(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(InputError, match=r"names (posix|nt)\.mkdir"):
        state._reader(tmp_path).read_metadata()
    assert not (tmp_path / "made").exists()
