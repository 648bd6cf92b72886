"""Damaged files, and small ones that would take much memory: each is one line, at once."""

import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import MODEL_ARGS, make_llama, save_llama

from config import LlamaConfig
from llama import load_pretrained
from minllama.checkpoints import formats, integrity, llama2c, pt
from minllama.checkpoints.layout import Checkpoint, shapes_of
from minllama.checkpoints.pt import read_checkpoint
from minllama.common.errors import InputError
from minllama.methods.saved import read_saved
from minllama.tasks.finetune import FinetuneSettings

ROOT = Path(__file__).parent.parent.parent
FINETUNE = ["--option", "finetune", "--epochs", "1", "--lr", "0.001"]


@pytest.fixture
def model(tmp_path) -> Path:
    return save_llama(make_llama(), tmp_path / "model.pt")


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def start_of(path: Path, record: str) -> int:
    """Where the content of a zip's record begins."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(record)
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)
        return info.header_offset + 30 + sum(struct.unpack("<2H", file.read(4)))


def rewritten(path: Path, compression: int = zipfile.ZIP_STORED, **records: bytes) -> Path:
    """The same zip written by another program; with `pickle` another list of values."""
    with zipfile.ZipFile(path) as old:
        contents = {name: old.read(name) for name in old.namelist()}
    new = path.with_name("rewritten.pt")
    with zipfile.ZipFile(new, "w", compression) as archive:
        for name, content in contents.items():
            archive.writestr(
                name, records["pickle"] if name.endswith("data.pkl") and records else content
            )
    return new


# Damage


@pytest.mark.parametrize("record", ["data/0", "data/5", "data.pkl", "version"])
def test_one_changed_byte_is_seen_and_its_record_named(model, record):
    flip(model, start_of(model, f"model/{record}"))
    with pytest.raises(InputError, match=f"a damaged checkpoint, its record model/{record} is not"):
        load_pretrained(model)


def test_large_files_are_compared_where_that_is_asked_for(model, monkeypatch):
    formats.verify(model)
    monkeypatch.setattr(integrity, "LARGE", 100)
    flip(model, start_of(model, "model/data/3"))
    load_pretrained(model)
    with pytest.raises(InputError, match="record model/data/3 is not as its checksum says"):
        formats.verify(model)


@pytest.mark.parametrize(
    "option",
    [["--option", "generate"], ["--option", "prompt"], FINETUNE, ["--option", "pretrain"]],
    ids=lambda option: option[1],
)
def test_verify_acts_with_every_option(project, run_cli, monkeypatch, option):
    monkeypatch.setattr(integrity, "LARGE", 100)
    flip(project.path / "model.pt", start_of(project.path / "model.pt", "model/data/3"))
    code, _, err = run_cli(*option, *project.flags, "--verify")
    assert (code, err.count("\n")) == (2, 1), err
    assert err.startswith("error: model.pt: a damaged checkpoint, its record model/data/3 "), err


def test_verify_is_refused_where_it_cannot_act(project, run_cli):
    checkpoint = formats.load("model.pt")
    checkpoint.config.causal = True
    llama2c.save(checkpoint, "model.bin", version=0)
    code, _, err = run_cli("--pretrained-model-path", "model.bin", "--verify")
    assert (code, err) == (2, "error: --verify: model.bin carries no checksums; leave it out\n")
    code, _, err = run_cli("--option", "pretrain", "--text", "x.txt", "--verify")
    assert (code, err) == (2, "error: --verify: no checkpoint is read; leave it out\n")


def test_what_fine_tuning_saved_and_the_state_of_a_training_are_compared_too(tmp_path):
    torch.save({"step": 1, "model": {"x": torch.ones(9)}}, tmp_path / "state.pt")
    assert read_checkpoint(tmp_path / "state.pt")["step"] == 1
    flip(tmp_path / "state.pt", start_of(tmp_path / "state.pt", "state/data/0") + 3)
    with pytest.raises(InputError, match="record state/data/0 is not as its checksum says"):
        read_checkpoint(tmp_path / "state.pt")


def test_every_single_byte_of_a_file_may_change(tmp_path):
    """It loads as it was, or is refused: no other error, and no other values."""
    path = tmp_path / "x.pt"
    torch.save({"a": torch.arange(4.0), "b": [1, "text"]}, path)
    content = path.read_bytes()
    for position in range(0, len(content), 3):
        path.write_bytes(content)
        flip(path, position)
        try:
            loaded = read_checkpoint(path)
        except InputError:
            continue
        assert torch.equal(loaded["a"], torch.arange(4.0)) and loaded["b"] == [1, "text"]


# Files that are larger than they look


def zip_around(folder: Path, pickled: bytes, storage: bytes = b"\0" * 64) -> Path:
    """A file with a pickle of one's own, and one storage."""
    torch.save({"x": torch.zeros(len(storage) // 4)}, folder / "one.pt")
    return rewritten(folder / "one.pt", pickle=pickled)


def calling(function: str, *arguments: bytes) -> bytes:
    module, _, name = function.rpartition(".")
    call = f"c{module}\n{name}\n".encode() + b"(" + b"".join(arguments) + b"tR"
    return b"\x80\x02}X\x05\0\0\0model" + call + b"s."


def number(value: int) -> bytes:
    return pickle.dumps(value, protocol=2)[2:-1]


BOMBS = {
    "bytearray": calling("__builtin__.bytearray", number(2**32)),
    "storage": calling("torch.UntypedStorage", number(2**33)),
    "meta": calling("torch.Tensor", number(2**20), number(2**20)),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_pickle_that_makes_something_large_is_refused_unmade(tmp_path, name):
    path = zip_around(tmp_path, BOMBS[name])
    with pytest.raises(InputError, match="refused, it"):
        read_checkpoint(path)


def test_values_of_many_references_are_refused_unprinted(tmp_path):
    value = ["name"]
    for _ in range(40):
        value = [value, value]
    model_args = MODEL_ARGS | {"dim": value}
    torch.save({"model": {}, "model_args": model_args}, tmp_path / "many.pt")
    assert (tmp_path / "many.pt").stat().st_size < 3000
    with pytest.raises(InputError, match="more values than any checkpoint") as error:
        load_pretrained(tmp_path / "many.pt")
    assert len(str(error.value)) < 500
    key = ("name",)
    for _ in range(40):
        key = (key, key)
    pickled = pickle.dumps({}, protocol=2)[:-1]
    steps = b"X\x01\0\0\0a\x85" + b"q\0h\0\x86" * 40
    with pytest.raises(InputError, match="neither a text nor a small number"):
        read_checkpoint(zip_around(tmp_path, pickled + steps + b"Ns."))


@pytest.mark.parametrize("n_layers", [10**9, 2**31, 10**300])
def test_a_file_with_many_layers_is_refused_at_once(tmp_path, n_layers):
    model_args = MODEL_ARGS | {"n_layers": n_layers}
    torch.save({"model": {}, "model_args": model_args}, tmp_path / "deep.pt")
    with pytest.raises(InputError, match=r"n_layers is|is to have 1000000000 layers"):
        load_pretrained(tmp_path / "deep.pt")
    (tmp_path / "deep.bin").write_bytes(struct.pack("<7i", 32, 96, 10**9, 4, 2, 320, 128) * 50)
    with pytest.raises(InputError):
        load_pretrained(tmp_path / "deep.bin")


def test_a_long_context_needs_a_table_that_no_small_file_gets(model):
    saved = torch.load(model)
    torch.save(saved | {"model_args": saved["model_args"] | {"max_seq_len": 2**30}}, model)
    with pytest.raises(InputError, match="max_seq_len is 1073741824, at most"):
        load_pretrained(model)


def test_expanded_and_repeated_tensors_are_refused(tmp_path):
    saved = {"model": {"output.weight": torch.zeros(1).expand(1_000_000, 2048)}}
    torch.save(saved | {"model_args": MODEL_ARGS}, tmp_path / "wide.pt")
    with pytest.raises(InputError, match="a tensor of more elements than are stored"):
        load_pretrained(tmp_path / "wide.pt")
    one = torch.zeros(100_000)
    torch.save({"model": {str(i): one for i in range(100)}}, tmp_path / "same.pt")
    with pytest.raises(InputError, match="more than twice the"):
        read_checkpoint(tmp_path / "same.pt")


def test_compressed_records_are_refused(tmp_path):
    torch.save({"x": torch.zeros(1_000_000)}, tmp_path / "zeros.pt")
    small = rewritten(tmp_path / "zeros.pt", zipfile.ZIP_DEFLATED)
    assert small.stat().st_size < 20_000
    with pytest.raises(InputError, match="is compressed"):
        read_checkpoint(small)
    assert "x" in read_checkpoint(rewritten(tmp_path / "zeros.pt"))


def test_records_that_overlap_or_share_a_name_are_refused(tmp_path):
    torch.save({"x": torch.zeros(1000), "y": torch.ones(1000)}, tmp_path / "two.pt")
    content = (tmp_path / "two.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "two.pt") as archive:
        first, second = (archive.getinfo(f"two/data/{i}") for i in (0, 1))
        start = archive.start_dir
    old, new = (struct.pack("<I", info.header_offset) for info in (second, first))
    overlapping = content[:start] + content[start:].replace(old, new, 1)
    (tmp_path / "overlap.pt").write_bytes(overlapping)
    with pytest.raises(InputError, match="overlaps another"):
        read_checkpoint(tmp_path / "overlap.pt")
    (tmp_path / "twice.pt").write_bytes(content.replace(b"two/data/1", b"two/data/0"))
    with pytest.raises(InputError, match="two records of the same name"):
        read_checkpoint(tmp_path / "twice.pt")


@pytest.mark.skipif(sys.platform == "win32", reason="Unix's devices")
@pytest.mark.parametrize("make", [os.mkfifo if hasattr(os, "mkfifo") else None, os.mkdir])
def test_only_files_are_opened(tmp_path, run_cli, monkeypatch, make):
    make(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="not a file"):
        read_checkpoint(tmp_path / "other")
    code, _, err = run_cli("--pretrained-model-path", str(tmp_path / "other"))
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1


# Old files and other tensors


def test_files_of_old_versions_load_and_are_checked_too(tmp_path, model):
    saved = torch.load(model)
    old = tmp_path / "old.pt"
    torch.save(saved, old, _use_new_zipfile_serialization=False)
    loaded = load_pretrained(old).state_dict()
    for name, tensor in load_pretrained(model).state_dict().items():
        assert torch.equal(loaded[name], tensor)
    content = old.read_bytes()
    old.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="incomplete, only its first"):
        load_pretrained(old)
    torch.save({"x": torch.zeros(1)}, old, _use_new_zipfile_serialization=False)
    huge = b"\x8a\x06" + b"\xff" * 5 + b"\x0f"  # a number of 44 bits
    wide, n = re.subn(rb"(cpuq.)K\x01", lambda found: found[1] + huge, old.read_bytes())
    assert n == 1
    old.write_bytes(wide)
    with pytest.raises(InputError, match="incomplete"):
        read_checkpoint(old)


def test_ordinary_values_and_tensors_still_load(tmp_path):
    base = torch.arange(24.0).view(4, 6)
    values = {
        "text": "ü", "none": None, "numbers": [1, -2, 2**70, 1.5, True, 1 + 2j], "set": {1, "a"},
        "bytes": b"\x00\xff", "size": torch.Size([2, 3]), "dtype": torch.bfloat16,
        "device": torch.device("cpu"), 5: (1, (2, 3)),
    }  # fmt: skip
    tensors = {
        "views": [base[1:, ::2], base.t(), base[0]], "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3), "parameter": torch.nn.Parameter(torch.ones(2)),
        "float8": torch.ones(4).to(torch.float8_e4m3fn), "uint16": torch.ones(3).to(torch.uint16),
        "bool": torch.tensor([True]), "complex": torch.ones(2, dtype=torch.complex64),
        "state": torch.nn.Linear(2, 2).state_dict(),
    }  # fmt: skip
    torch.save(values | tensors, tmp_path / "x.pt")
    for mapped in (False, True):
        loaded = read_checkpoint(tmp_path / "x.pt", mapped=mapped)
        assert all(loaded[name] == value for name, value in values.items())
        for ours, theirs in zip(loaded["views"], tensors["views"], strict=True):
            assert torch.equal(ours, theirs)
        assert loaded["empty"].shape == (0, 3) and loaded["float8"].dtype == torch.float8_e4m3fn


@pytest.mark.parametrize(
    "tensor",
    [
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        torch.ones(3).to_sparse(),
        torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        torch.ones(3, device="meta"),
    ],
    ids=["nested", "sparse", "quantized", "meta"],
)
def test_other_kinds_of_tensors_are_refused(tmp_path, tensor):
    torch.save({"x": tensor}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="refused, it names torch"):
        read_checkpoint(tmp_path / "x.pt")


def test_values_that_are_too_large_for_float32_are_refused(model):
    saved = torch.load(model)
    saved["model"]["norm.weight"] = torch.full((32,), 1e300, dtype=torch.float64)
    torch.save(saved, model)
    with pytest.raises(InputError, match=r"norm\.weight has values that are not finite"):
        load_pretrained(model)


# What fine-tuning saved


@pytest.fixture
def finetuned(project, run_cli) -> Path:
    code, _, err = run_cli(*FINETUNE, *project.flags)
    assert code == 0, err
    return project.path / "finetune-1-0.001.pt"


def changed(saved: dict, part: str, **changes) -> dict:
    return saved | {part: saved[part] | changes}


HEAD = "classifier_head.weight"
EDITS = {
    "integers": lambda s: changed(s, "model", **{HEAD: s["model"][HEAD].int()}),
    "booleans": lambda s: changed(s, "model", **{HEAD: s["model"][HEAD].bool()}),
    "complex": lambda s: changed(s, "model", **{HEAD: s["model"][HEAD].to(torch.complex64)}),
    "float8": lambda s: changed(s, "model", **{HEAD: s["model"][HEAD].to(torch.float8_e5m2)}),
    "overflow": lambda s: changed(s, "model", **{HEAD: s["model"][HEAD].double() * 1e200}),
    "no tensor": lambda s: changed(s, "model", **{HEAD: 3}),
    "absent": lambda s: changed(s, "model") | {"model": {}},
    "2^31 labels": lambda s: changed(s, "model_config", num_labels=2**31),
    "many labels": lambda s: changed(s, "model_config", num_labels=9000),
    "label as text": lambda s: changed(s, "model_config", num_labels="3"),
    "dropout": lambda s: changed(s, "model_config", hidden_dropout_prob=7.0),
    "option": lambda s: changed(s, "model_config", option="x"),
    "names": lambda s: changed(s, "model_config", label_names=["a"]),
    "no labels": lambda s: s | {"model_config": {"option": "finetune"}},
    "no model": lambda s: {key: x for key, x in s.items() if key != "model"},
    "args": lambda s: changed(s, "args", batch_size=[]),
    "args list": lambda s: s | {"args": []},
    "digest": lambda s: s | {"frozen": torch.ones(2)},
    "wide": lambda s: changed(s, "model_config", tune="adapter", adapter_size=2**30),
    "keys": lambda s: s | {"model": {5: torch.ones(1), None: torch.ones(2)}},
}


@pytest.mark.parametrize("name", EDITS)
def test_edited_files_of_fine_tuning_are_refused_in_one_line(project, finetuned, run_cli, name):
    torch.save(EDITS[name](torch.load(finetuned)), "edited.pt")
    code, _, err = run_cli("--option", "finetune", "--load", "edited.pt")
    start = "error: --adapter_size 1073741824: " if name == "wide" else "error: edited.pt: "
    assert code == 2 and err.startswith(start) and err.count("\n") == 1, err
    assert len(err) < 600


def test_lower_and_higher_precision_is_still_taken(project, finetuned, run_cli):
    saved = torch.load(finetuned)
    for dtype in (torch.float64, torch.bfloat16):
        model = {name: tensor.to(dtype) for name, tensor in saved["model"].items()}
        torch.save(saved | {"model": model}, "other.pt")
        code, _, err = run_cli("--option", "finetune", "--load", "other.pt")
        assert code == 0, err
    assert read_saved("other.pt", FinetuneSettings).config.num_labels == 3


# Out of memory


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_an_intact_file_is_not_called_damaged_where_memory_runs_out(tmp_path):
    """Its mapping or its copy does not fit what the process may have."""
    config = LlamaConfig(vocab_size=320, n_layers=16)  # 100 MB in bfloat16
    shapes = shapes_of(config).items()
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes}
    pt.save(Checkpoint(config, tensors, "zeros"), tmp_path / "large.pt")
    script = (
        "import resource, sys, torch\n"
        "from llama import load_pretrained\n"
        "from minllama.common.program import run_script\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "limit = used + int(sys.argv[2])\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "run_script(lambda: load_pretrained(sys.argv[1], init_weights=False))\n"
    )
    for room in (60_000_000, 220_000_000):  # not for the file; for it, but not for float32
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "large.pt"), str(room)],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("error: out of memory: "), done.stderr
        assert "asked for while loading" in done.stderr and done.stderr.count("\n") == 1
        assert "damaged" not in done.stderr
