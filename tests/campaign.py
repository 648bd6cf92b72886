"""Bad inputs and kills by the thousand, the long version of what the tests do.

    .venv/bin/python -m tests.campaign --minutes 60

It works on a tiny model of its own in a temporary folder, for Linux. Inputs: random flags, mutated
data, checkpoints, saved classifiers, tokenizers and run folders. Each goes to a process of its own
(a fork, so that thousands are possible), which has to end as promised: exit code 0, or 2 with one
line on standard error, within 20 seconds, with at most twice the memory of the same valid input,
and without a file lost. Kills: fine-tunings and pre-trainings are killed at a random operation on
files or a random moment, once or more often, and then have to end with the very weights of an
undisturbed run. Prints a table of what was tried and passed; every failure is told, with its seed.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

# isort: split
import sentencepiece
import torch

import run_llama
from config import LlamaConfig
from llama import Llama
from minllama.checkpoints.pt import read_checkpoint
from minllama.common.program import run_script

ROOT = Path(__file__).parent.parent
TEXT = "the film was warm and funny but the plot of it was thin and old, said nobody {}"
MODEL = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 300}
MODEL |= {"multiple_of": 32, "max_seq_len": 64}
SECONDS = 20


def prepare() -> None:
    """Put model, tokenizer, data, a saved classifier and a run folder into the working folder."""
    lines = [TEXT.format(i) for i in range(60)]
    Path("text.txt").write_text("\n<|endoftext|>\n".join(lines * 3))
    for split, n in (("train", 12), ("dev", 6), ("test", 6)):
        rows = (f"{i % 3} ||| {lines[i]}\n" for i in range(n))
        Path(f"toy-{split}.txt").write_text("".join(rows))
    Path("toy-label-mapping.json").write_text('["bad", "fair", "good"]')
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 5),
        model_prefix="tokenizer",
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    n_words = sentencepiece.SentencePieceProcessor(model_file="tokenizer.model").vocab_size()
    torch.manual_seed(0)
    llama = Llama(LlamaConfig(**MODEL | {"vocab_size": n_words}))
    args = MODEL | {"vocab_size": n_words}
    torch.save({"model": llama.state_dict(), "model_args": args}, "model.pt")


DATA = ["--pretrained-model-path", "model.pt", "--tokenizer-path", "tokenizer.model"]
DATA += ["--train", "toy-train.txt", "--dev", "toy-dev.txt", "--test", "toy-test.txt"]
DATA += ["--label-names", "toy-label-mapping.json", "--batch_size", "4", "--epochs", "1"]
GENERATE = ["--option", "generate", *DATA[:4], "--max_new_tokens", "3"]
FINETUNE = ["--option", "finetune", *DATA]
PROMPT = ["--option", "prompt", *DATA]
PRETRAIN = ["--option", "pretrain", "--text", "text.txt", "--vocab_size", "290", "--dim", "16"]
PRETRAIN += ["--n_layers", "1", "--n_heads", "2", "--max_seq_len", "16", "--steps", "8"]
PRETRAIN += ["--eval_every", "4", "--output_dir", "run"]
SAVED = "finetune-1-2e-05.pt"
LOAD = [*FINETUNE[:-4], "--load", SAVED]


def forked(flags: list[str]) -> tuple[int, str, float, int]:
    """Run in a child: its exit code (-9 after too long), standard error, seconds, peak bytes."""
    start = time.monotonic()
    with tempfile.TemporaryFile() as err:
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(err.fileno(), 2)
            code = 1
            try:
                sys.argv = ["run_llama.py", *flags]
                run_script(run_llama.main)
                code = 0
            except SystemExit as stop:
                code = stop.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(Exception):
                    sys.stderr.flush()
                os._exit(code)
        while True:
            done, status, usage = os.wait4(pid, os.WNOHANG)
            if done:
                break
            if time.monotonic() - start > SECONDS:
                os.kill(pid, signal.SIGKILL)
                _, status, usage = os.wait4(pid, 0)
                break
            time.sleep(0.005)
        err.seek(0)
        told = err.read().decode(errors="replace")
    code = os.waitstatus_to_exitcode(status)
    return code, told, time.monotonic() - start, usage.ru_maxrss * 1024


def mutate(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, cut, doubled or put in."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, n = rng.randrange(len(data) + 1), rng.choice((1, 2, 8, 100))
        kind = rng.randrange(5)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at : at + n]
        elif kind == 2:
            data[at:at] = data[at : at + n]
        elif kind == 3:
            data[at:at] = rng.randbytes(n)
        else:
            del data[at:]
    return bytes(data)


VALUES = [None, True, -1, 0, 2**31, 2**63, 10**30, float("nan"), float("inf"), "", "x" * 1000, []]
VALUES += [{}, [[[1]]], b"\0", torch.ones(3), torch.ones(2, dtype=torch.int64), torch.ones(0)]
VALUES += [torch.full((2, 2), torch.nan), torch.ones(2, dtype=torch.complex64)]


def edit(saved: object, rng: random.Random, depth: int = 0) -> object:
    """A value of a nested dict or list replaced, removed or renamed."""
    if isinstance(saved, dict) and saved and (depth == 0 or rng.random() < 0.8):
        saved, key = dict(saved), rng.choice(list(saved))
        kind = rng.randrange(8)
        if kind == 0:
            del saved[key]
        elif kind == 1:
            saved[rng.choice(["x", 5, ""])] = saved.pop(key)
        else:
            saved[key] = edit(saved[key], rng, depth + 1)
        return saved
    if isinstance(saved, list) and saved and rng.random() < 0.6:
        at = rng.randrange(len(saved))
        return [*saved[:at], edit(saved[at], rng, depth + 1), *saved[at + 1 :]]
    if isinstance(saved, torch.Tensor) and rng.random() < 0.6:
        wrong = [saved.double(), saved.long(), saved.flatten(), saved[..., :1], saved * torch.nan]
        return rng.choice([*wrong, saved.unsqueeze(0), saved.expand(2, *saved.shape)])
    return rng.choice(VALUES)


def edited_file(path: str, rng: random.Random) -> None:
    """Bytes mutated, or values edited; of a zip also its members."""
    data = Path(path).read_bytes()
    kind = rng.randrange(3)
    if path.endswith(".pt") and kind == 0:
        try:
            torch.save(edit(torch.load(io.BytesIO(data), weights_only=True), rng), path)
            return
        except Exception:  # what cannot be saved is mutated
            pass
    if path.endswith(".json") and kind == 0:
        Path(path).write_text(json.dumps(edit(json.loads(data), rng), default=str))
        return
    if path.endswith(".pt") and kind == 1:
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(path, "w") as new:
            names = old.namelist()
            target = rng.choice(names)
            for name in names:
                content = old.read(name)
                if name == target:
                    content = mutate(content, rng)
                new.writestr(name, content, rng.choice((0, 0, 0, 8)))
        return
    Path(path).write_bytes(mutate(data, rng))


FLAG = re.compile(r"^  (--[\w-]+)", re.MULTILINE)


def random_flags(rng: random.Random, known: list[str]) -> list[str]:
    values = ["0", "-1", "1", "2", "1e-3", "nan", "inf", "1e400", "2147483647", "4294967296", ""]
    values += ["x", "--", "model.pt", "toy-dev.txt", ".", "/dev/null", "/dev/full", "a/b", "\n"]
    values += ["x" * 300, "ü", "out", "bfloat16", "lora", "run"]
    flags = list(rng.choice([GENERATE, FINETUNE, PROMPT, PRETRAIN]))
    for _ in range(rng.choice((1, 1, 2, 3))):
        flags.append(rng.choice(known))
        flags += rng.choices(values, k=rng.choice((0, 1, 1, 1, 2)))
    return flags


def kinds(known: list[str]) -> dict[str, Callable[[random.Random], list[str]]]:
    """By name what changes a file in the working folder, and returns the flags to run with."""

    def of(files: list[str], flags: list[list[str]]) -> Callable[[random.Random], list[str]]:
        def change(rng: random.Random) -> list[str]:
            edited_file(rng.choice(files), rng)
            return rng.choice(flags)

        return change

    data = ["toy-train.txt", "toy-dev.txt", "toy-label-mapping.json"]
    run = ["run/state.pt", "run/model.pt", "run/metrics.jsonl", "run/pretrain.json"]
    run += ["run/tokenizer.model", "run/tokens/index.json", "run/tokens/train.bin"]
    return {
        "flags": lambda rng: random_flags(rng, known),
        "data": of(data, [FINETUNE, PROMPT]),
        "text": of(["text.txt"], [[*PRETRAIN[:-1], "new"]]),
        "checkpoint": of(["model.pt"], [GENERATE, PROMPT, FINETUNE]),
        "saved classifier": of([SAVED], [LOAD]),
        "tokenizer": of(["tokenizer.model"], [GENERATE, PROMPT]),
        "run folder": of(run, [PRETRAIN]),
    }


def complaint(result: tuple, valid: tuple) -> str | None:
    code, told, seconds, peak = result
    lines = [line for line in told.splitlines() if not line.startswith("warning: ")]
    if seconds > SECONDS:
        return f"took over {SECONDS} s"
    if "Traceback" in told or code not in (0, 2):
        return f"exit code {code}: {told[-400:]}"
    if code == 2 and sum(line.startswith("error: ") for line in lines) != 1:
        return f"not one error: {told[:400]}"
    if max(map(len, lines), default=0) > 2000:
        return f"a line of {max(map(len, lines))} characters"
    if peak > 2 * valid[3]:
        return f"{peak / 2**20:.0f} MiB, the valid input {valid[3] / 2**20:.0f}"
    return None


def bad_inputs(folder: Path, until: float, seed: int) -> collections.Counter:
    known = FLAG.findall(run_llama.make_parser().format_help())
    made, counts = kinds(known), collections.Counter()
    outputs = {SAVED, "run"}
    os.chdir(folder)
    prepare()
    for flags in (FINETUNE, PRETRAIN):
        assert forked(flags)[0] == 0
    before = folder.parent / "before"
    shutil.copytree(folder, before)
    runs = [forked(flags) for flags in (GENERATE, FINETUNE, PROMPT, PRETRAIN, LOAD)]
    assert not any(run[0] for run in runs), runs
    valid = max(runs, key=lambda run: run[3])
    while time.monotonic() < until:
        seed += 1
        rng = random.Random(seed)
        name = rng.choice(list(made))
        os.chdir(folder.parent)
        shutil.rmtree(folder)
        shutil.copytree(before, folder)
        os.chdir(folder)
        flags = made[name](rng)
        contents = {path: path.read_bytes() for path in map(Path, ("model.pt", "text.txt"))}
        result = forked(flags)
        wrong = complaint(result, valid)
        if any(not path.is_file() or path.read_bytes() != data for path, data in contents.items()):
            wrong = "changed what it reads"
        if not all(Path(output).exists() for output in outputs):
            wrong = f"lost one of {outputs}"
        left = [path.name for path in Path().rglob(".*.tmp")]
        wrong = wrong or (f"left {left}" if left else None)
        counts[name, "tried"] += 1
        counts[name, "refused" if result[0] == 2 else "ran"] += 1
        if wrong:
            counts[name, "failed"] += 1
            print(f"seed {seed}, {name}: {' '.join(flags)!r}: {wrong}", flush=True)
    return counts


KILLED = {
    "fine-tuning": [*FINETUNE[:-1], "3", "--save_every", "2", "--hidden_dropout_prob", "0.2"],
    "LoRA": [*FINETUNE[:-1], "2", "--tune", "lora", "--causal"],
    "pre-training": [*PRETRAIN, "--dropout", "0.1"],
}


def weights_of(folder: Path) -> dict:
    path = next(iter([*folder.glob("finetune-*.pt"), *folder.glob("run/model.pt")]))
    return read_checkpoint(path)["model"]


def run_killed(folder: Path, flags: list[str], n: int, seconds: float | None = None) -> int:
    """Run, killed at the n-th operation on files or after some seconds; how many there were."""
    command = [sys.executable, "-m", "tests.file_operations", str(n), str(ROOT / "run_llama.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*command, *flags], cwd=folder, env=environment, stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        _, told = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return 0
    if process.returncode not in (0, -signal.SIGKILL):
        raise AssertionError(told[-500:])
    return int(told.splitlines()[-1]) if process.returncode == 0 and n == 0 else 0


def kills(folder: Path, until: float, seed: int) -> collections.Counter:
    counts: collections.Counter = collections.Counter()
    os.chdir(folder)
    prepare()
    files = {path.name: path.read_bytes() for path in Path().iterdir() if path.is_file()}
    references = {}

    def fresh(name: str) -> Path:
        place = folder.parent / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        for file, content in files.items():
            (place / file).write_bytes(content)
        return place

    for name, flags in KILLED.items():
        place, start = fresh(f"whole {name}"), time.monotonic()
        n = run_killed(place, flags, 0)
        references[name] = (weights_of(place), n, time.monotonic() - start, names_in(place))
    while time.monotonic() < until:
        seed += 1
        rng = random.Random(seed)
        name = rng.choice(list(KILLED))
        whole, n, seconds, names = references[name]
        place, n_kills = fresh("killed"), rng.choice((1, 1, 2, 3))
        try:
            for _ in range(n_kills):
                if rng.random() < 0.7:
                    run_killed(place, KILLED[name], rng.randint(1, n))
                else:
                    run_killed(place, KILLED[name], 0, rng.uniform(0.5, seconds))
            run_killed(place, KILLED[name], 0)
            ours = weights_of(place)
            same = ours.keys() == whole.keys() and names_in(place) == names
            same = same and all(torch.equal(ours[key], whole[key]) for key in whole)
            wrong = None if same else f"other weights or files: {names_in(place) ^ names}"
        except AssertionError as error:
            wrong = str(error)
        counts[name, "tried"] += 1
        counts[name, "kills"] += n_kills
        if wrong:
            counts[name, "failed"] += 1
            print(f"seed {seed}, kills of {name}: {wrong}", flush=True)
    return counts


def names_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills_share", type=float, default=0.5, metavar="SHARE")
    args = parser.parse_args()
    import resource  # not on Windows

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    begin = time.monotonic()
    middle = begin + 60 * args.minutes * (1 - args.kills_share)
    tables = []
    for do, until in ((bad_inputs, middle), (kills, begin + 60 * args.minutes)):
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "work"
            folder.mkdir()
            tables.append(do(folder, until, 1_000_000 * args.seed))
            os.chdir(ROOT)
    for counts, columns in zip(tables, (("ran", "refused"), ("kills",)), strict=True):
        print(f"| kind | tried | {' | '.join(columns)} | failed |")
        print("| --- |" + " --- |" * (len(columns) + 2))
        for name in dict.fromkeys(name for name, _ in counts):
            cells = [counts[name, column] for column in ("tried", *columns, "failed")]
            print(f"| {name} | {' | '.join(map(str, cells))} |")
        print()
    sys.exit(any(counts[key] for counts in tables for key in counts if key[1] == "failed"))


if __name__ == "__main__":
    main()
