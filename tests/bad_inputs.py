"""A tiny model with its data, and random ways to damage their files or to choose wrong flags."""

import io
import json
import random
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import sentencepiece
import torch

import run_llama
from config import LlamaConfig
from llama import Llama

TEXT = "the film was warm and funny but the plot of it was thin and old, said nobody {}"
MODEL = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 300}
MODEL |= {"multiple_of": 32, "max_seq_len": 64}

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

FLAG_VALUES = ["0", "-1", "1", "2", "1e-3", "nan", "inf", "1e400", "2147483647", "4294967296", ""]
FLAG_VALUES += ["x", "--", "model.pt", "toy-dev.txt", ".", "/dev/null", "/dev/full", "a/b", "\n"]
FLAG_VALUES += ["x" * 300, "ü", "out", "bfloat16", "lora", "run"]
SAVED_VALUES = [None, True, -1, 0, 2**31, 2**63, 10**30, float("nan"), float("inf"), "", "x" * 1000]
SAVED_VALUES += [[], {}, [[[1]]], b"\0", torch.ones(3), torch.ones(2, dtype=torch.int64)]
SAVED_VALUES += [torch.ones(0), torch.full((2, 2), torch.nan)]
SAVED_VALUES += [torch.ones(2, dtype=torch.complex64)]

DATA_FILES = ["toy-train.txt", "toy-dev.txt", "toy-label-mapping.json"]
RUN_FILES = ["run/state.pt", "run/model.pt", "run/metrics.jsonl", "run/pretrain.json"]
RUN_FILES += ["run/tokenizer.model", "run/tokens/index.json", "run/tokens/train.bin"]
KINDS = {  # the files that are damaged, and the runs that read them
    "data": (DATA_FILES, [FINETUNE, PROMPT]),
    "text": (["text.txt"], [[*PRETRAIN[:-1], "new"]]),
    "checkpoint": (["model.pt"], [GENERATE, PROMPT, FINETUNE]),
    "saved classifier": ([SAVED], [LOAD]),
    "tokenizer": (["tokenizer.model"], [GENERATE, PROMPT]),
    "run folder": (RUN_FILES, [PRETRAIN]),
    "flags": ([], [GENERATE, FINETUNE, PROMPT, PRETRAIN]),
}


def prepare() -> None:
    """Write model, tokenizer and data into the working folder."""
    lines = [TEXT.format(i) for i in range(60)]
    Path("text.txt").write_text("\n<|endoftext|>\n".join(lines * 3))
    for split, n in (("train", 12), ("dev", 6), ("test", 6)):
        labelled = (f"{i % 3} ||| {lines[i]}\n" for i in range(n))
        Path(f"toy-{split}.txt").write_text("".join(labelled))
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
    args = MODEL | {"vocab_size": n_words}
    torch.manual_seed(0)
    llama = Llama(LlamaConfig(**args))
    torch.save({"model": llama.state_dict(), "model_args": args}, "model.pt")


def make_bad_input(kind: str, rng: random.Random) -> list[str]:
    """Damage a file in the working folder, or choose flags; return the flags of the run."""
    files, runs = KINDS[kind]
    flags = list(rng.choice(runs))
    if files:
        damage(rng.choice(files), rng)
        return flags
    known = re.findall(r"^  (--[\w-]+)", run_llama.make_parser().format_help(), re.MULTILINE)
    for _ in range(rng.choice((1, 1, 2, 3))):
        flags.append(rng.choice(known))
        flags += rng.choices(FLAG_VALUES, k=rng.choice((0, 1, 1, 1, 2)))
    return flags


def damage(path: str, rng: random.Random) -> None:
    """Change bytes of a file, a member of a zip file, or a saved value."""
    data = Path(path).read_bytes()
    ways: list[Callable[[str, bytes, random.Random], None]] = [write_mutated, write_mutated]
    if path.endswith(".pt"):
        ways = [write_mutated, write_mutated_member, write_edited]
    elif path.endswith(".json"):
        ways = [write_mutated, write_mutated, write_edited]
    rng.choice(ways)(path, data, rng)


def write_mutated(path: str, data: bytes, rng: random.Random) -> None:
    """Write a file with changed bytes."""
    Path(path).write_bytes(mutate(data, rng))


def write_mutated_member(path: str, data: bytes, rng: random.Random) -> None:
    """Write a zip file with changed bytes in one member, and random compression."""
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(path, "w") as new:
        names = old.namelist()
        target = rng.choice(names)
        for name in names:
            content = old.read(name)
            content = mutate(content, rng) if name == target else content
            new.writestr(name, content, rng.choice((0, 0, 0, 8)))


def write_edited(path: str, data: bytes, rng: random.Random) -> None:
    """Write a checkpoint or a JSON file with a changed value."""
    if path.endswith(".json"):
        Path(path).write_text(json.dumps(edit(json.loads(data), rng), default=str))
        return
    try:
        torch.save(edit(torch.load(io.BytesIO(data), weights_only=True), rng), path)
    except Exception:  # the value cannot be saved
        write_mutated(path, data, rng)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Flip, remove, repeat or insert a few bytes."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, n = rng.randrange(len(changed) + 1), rng.choice((1, 2, 8, 100))
        kind = rng.randrange(5)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del changed[at : at + n]
        elif kind == 2:
            changed[at:at] = changed[at : at + n]
        elif kind == 3:
            changed[at:at] = rng.randbytes(n)
        else:
            del changed[at:]
    return bytes(changed)


def edit(saved: object, rng: random.Random, depth: int = 0) -> object:
    """Replace, remove or rename a value of a nested dict or list."""
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
    return rng.choice(SAVED_VALUES)
