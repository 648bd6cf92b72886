"""Models, tokenizers and data for the tests: made here, or real where `MINLLAMA_ASSETS` has them.

`MINLLAMA_ASSETS` names the folder that `setup.sh` may fetch from. Where folders `stories260K`,
`tinystories` and `expected` stand beside it, the tests on real weights run too.
"""

import contextlib
import functools
import itertools
import math
import os
import re
import shutil
import signal
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are so small that threads only cost
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

# isort: split
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

import run_llama
from config import LlamaConfig
from llama import Llama
from minllama.common.program import run_script
from tokenizer import Tokenizer

# In the background of a shell Ctrl-C is ignored, also by what is started there.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
SENTENCES = [
    "a warm and funny film that never loses its way",
    "the plot is thin and the jokes are old",
    "neither good nor bad , it simply ends",
    "an excellent cast in an awful story",
    "I would gladly see this one again",
    "two hours that I will never get back",
]


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder `MINLLAMA_ASSETS`, absolute."""
    folder = os.environ.get("MINLLAMA_ASSETS", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("MINLLAMA_ASSETS names no folder")
    return Path(folder).resolve()


@pytest.fixture(scope="session")
def real_assets(assets) -> Callable[[str], Path]:
    """Finds a folder beside `MINLLAMA_ASSETS`, or skips."""

    def find(name: str) -> Path:
        folder = assets.parent / name
        if not folder.is_dir():
            pytest.skip(f"no folder {name} beside MINLLAMA_ASSETS")
        return folder

    return find


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory) -> Path:
    """A SentencePiece model of 320 pieces with byte fallback, trained on sentences of ours."""
    folder = tmp_path_factory.mktemp("tokenizer")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path) -> Tokenizer:
    return Tokenizer(tokenizer_model=tokenizer_path)


MODEL_ARGS = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 320,
    "multiple_of": 32,
    "max_seq_len": 128,
}


def make_llama(seed: int = 0, scale: float = 5.0, **changes) -> Llama:
    """A small Llama whose random weights are large enough for attention to matter."""
    torch.manual_seed(seed)
    llama = Llama(LlamaConfig(**(MODEL_ARGS | changes))).eval()
    with torch.no_grad():
        for name, parameter in llama.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.mul_(scale)
    return llama


def save_llama(llama: Llama, path: Path, **changes) -> Path:
    """Save in the layout of `stories42M.pt`; `changes` go into `model_args`."""
    args = {name: getattr(llama.config, name) for name in MODEL_ARGS}
    weights = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    torch.save({"model": weights, "model_args": args | changes, "iter_num": 1}, path)
    return path


def make_project(folder: Path, tokenizer_path: Path) -> None:
    """Write a model, its tokenizer, and data of three labels into a folder."""
    save_llama(make_llama(), folder / "model.pt")
    shutil.copy(tokenizer_path, folder / "tokenizer.model")
    (folder / "data").mkdir()
    for split, n_lines in (("train", 12), ("dev", 6), ("test", 6)):
        lines = [f"{i % 3} ||| {SENTENCES[i % 6]} .\n" for i in range(n_lines)]
        (folder / f"data/toy-{split}.txt").write_text("".join(lines))
    (folder / "data/toy-label-mapping.json").write_text('["bad", "fair", "good"]')


PROJECT_FLAGS = ["--pretrained-model-path", "model.pt", "--batch_size", "4", "--epochs", "1"]
for _split in ("train", "dev", "test"):
    PROJECT_FLAGS += [f"--{_split}", f"data/toy-{_split}.txt"]
PROJECT_FLAGS += ["--label-names", "data/toy-label-mapping.json"]


@pytest.fixture
def project(tmp_path, monkeypatch, tokenizer_path) -> SimpleNamespace:
    """A folder of `make_project`, made the current one; its `flags` name the files."""
    monkeypatch.chdir(tmp_path)
    make_project(tmp_path, tokenizer_path)
    return SimpleNamespace(path=tmp_path, flags=list(PROJECT_FLAGS))


@pytest.fixture(scope="session")
def run_once() -> Callable[..., None]:
    """Runs `run_llama.py` in a folder for other fixtures; what it prints is in its printed.txt."""

    def run(folder: Path, *flags: str) -> None:
        printed = (folder / "printed.txt").open("w", encoding="utf-8")
        with pytest.MonkeyPatch.context() as patch, printed, contextlib.redirect_stdout(printed):
            patch.chdir(folder)
            patch.setattr(sys, "argv", ["run_llama.py", *flags])
            run_script(run_llama.main)

    return run


@pytest.fixture(scope="session")
def finetuned(tmp_path_factory, tokenizer_path, run_once) -> Callable[..., Path]:
    """Fine-tunes in a folder of `make_project`, once for each list of flags; returns the folder."""

    @functools.cache
    def train(*flags: str) -> Path:
        folder = tmp_path_factory.mktemp("finetuned")
        make_project(folder, tokenizer_path)
        run_once(folder, "--option", "finetune", *PROJECT_FLAGS, *flags)
        return folder

    return train


@pytest.fixture
def copy_finetuned(tmp_path, monkeypatch, finetuned) -> Callable[..., str]:
    """Makes a copy of `finetuned`'s folder the current one; returns the name of the weights."""

    def copy(*flags: str) -> str:
        shutil.copytree(finetuned(*flags), tmp_path / "copy")
        monkeypatch.chdir(tmp_path / "copy")
        (weights,) = Path().glob("finetune-*.pt")
        return weights.name

    return copy


@contextlib.contextmanager
def before_step(step: int, act: Callable[[Optimizer], None]) -> Iterator[None]:
    """Call a function before a step, counted from 1, of any optimizer."""
    steps = itertools.count(1)

    def hook(optimizer: Optimizer, *_) -> None:
        if next(steps) == step:
            act(optimizer)

    handle = register_optimizer_step_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def interrupted_at(step: int) -> contextlib.AbstractContextManager:
    """Raise KeyboardInterrupt, as Ctrl-C does, before a step of an optimizer."""

    def interrupt(_) -> None:
        raise KeyboardInterrupt

    return before_step(step, interrupt)


def diverging_at(step: int) -> contextlib.AbstractContextManager:
    """Let a step of an optimizer make weights NaN."""

    def poison(optimizer: Optimizer) -> None:
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad.fill_(math.nan)

    return before_step(step, poison)


@pytest.fixture
def run_cli(monkeypatch, capsys) -> Callable:
    """Runs `run_llama.py` in this process: flags to (exit code, stdout, stderr)."""

    def run(*flags: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["run_llama.py", *flags])
        code = 0
        try:
            run_script(run_llama.main)
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return run


def assert_refused(result: tuple[int, str, str], *parts: str) -> None:
    """Check that `run_cli` gave exit code 2 and one line of error with these parts."""
    code, _, err = result
    assert code == 2 and re.fullmatch(r"error: .+\n", err), (code, err)
    for part in parts:
        assert part in err
