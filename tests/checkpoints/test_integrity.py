"""Damaged files, and small ones that would take much memory: each is refused in one line."""

import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import MODEL_ARGS, ROOT, assert_refused, make_llama, save_llama

from config import LlamaConfig
from llama import load_pretrained
from minllama.checkpoints import integrity, pt
from minllama.checkpoints.layout import Checkpoint, shapes_of
from minllama.checkpoints.pt import read_checkpoint
from minllama.common.errors import InputError


@pytest.fixture
def model(tmp_path) -> Path:
    return save_llama(make_llama(), tmp_path / "model.pt")


def flip(path: Path, record: str, offset: int = 0) -> None:
    """Change a byte of a zip's record."""
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo(record).header_offset
    content = bytearray(path.read_bytes())
    start += 30 + sum(struct.unpack_from("<2H", content, start + 26))
    content[start + offset] ^= 1
    path.write_bytes(content)


def rewritten(path: Path, compression: int = zipfile.ZIP_STORED, pickled: bytes = b"") -> Path:
    """The same zip written by another program, with another pickle if one is given."""
    new = path.with_name("rewritten.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(new, "w", compression) as archive:
        for name in old.namelist():
            is_replaced = pickled and name.endswith("data.pkl")
            archive.writestr(name, pickled if is_replaced else old.read(name))
    return new


# Damage


@pytest.mark.parametrize("record", ["data/5", "data.pkl", "version"])
def test_a_changed_byte_is_noticed_and_its_record_named(project, run_cli, record):
    flip(project.path / "model.pt", f"model/{record}")
    for option in ("generate", "prompt", "finetune"):
        result = run_cli("--option", option, *project.flags)
        assert_refused(result, "model.pt: damaged", f"'model/{record}'")


def test_any_changed_byte_is_refused_or_harmless(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"a": torch.arange(4.0), "b": [1, "text"]}, path)
    content = path.read_bytes()
    for position in range(0, len(content), 5):
        changed = bytearray(content)
        changed[position] ^= 1
        path.write_bytes(changed)
        try:
            loaded = read_checkpoint(path)
        except InputError:
            continue
        assert torch.equal(loaded["a"], torch.arange(4.0)) and loaded["b"] == [1, "text"]


# Files that are larger than they look


def call(function: str, *arguments: int) -> bytes:
    """A pickle of a dict whose value a function returns."""
    module, _, name = function.rpartition(".")
    numbers = b"".join(pickle.dumps(value, protocol=2)[2:-1] for value in arguments)
    reduce = f"c{module}\n{name}\n".encode() + b"(" + numbers + b"tR"
    return b"\x80\x02}X\x05\0\0\0model" + reduce + b"s."


BOMBS = {
    "bytearray": call("__builtin__.bytearray", 2**32),
    "storage": call("torch.storage.UntypedStorage", 2**33),
    "tensor": call("torch.Tensor", 2**20, 2**20),
    "attributes of a storage": b"\x80\x02}ctorch.storage\nUntypedStorage\n}b.",
    "nested keys": pickle.dumps({}, 2)[:-1] + b"X\x01\0\0\0a\x85" + b"q\0h\0\x86" * 40 + b"Ns.",
    "nested encodings": b"\x80\x02}X\x01\0\0\0ac_codecs\nencode\n(X\x01\0\0\0aX\x03\0\0\0hextRs.",
    "large memo": b"\x80\x02}r\xff\xff\xff\xff\x96\xff\xff\xff\xff\xff\0\0\0.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_pickle_that_would_make_something_large_is_refused(tmp_path, name):
    torch.save({"x": torch.zeros(16)}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="refused"):
        integrity.check(rewritten(tmp_path / "x.pt", pickled=BOMBS[name]))


def test_values_of_many_references_are_refused_without_printing_them(tmp_path):
    value = ["name"]
    for _ in range(40):
        value = [value, value]
    torch.save({"model": {}, "model_args": MODEL_ARGS | {"dim": value}}, tmp_path / "many.pt")
    assert (tmp_path / "many.pt").stat().st_size < 3000
    with pytest.raises(InputError, match="refused") as error:
        load_pretrained(tmp_path / "many.pt")
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("n_layers", [10**4, 10**9, 2**31, 10**300])
def test_a_file_that_claims_many_layers_is_refused_at_once(tmp_path, n_layers):
    model_args = MODEL_ARGS | {"n_layers": n_layers}
    torch.save({"model": {}, "model_args": model_args}, tmp_path / "deep.pt")
    with pytest.raises(InputError, match=r"n_layers is|layers\.0\..* is missing"):
        load_pretrained(tmp_path / "deep.pt")
    header = struct.pack("<7i", 32, 96, min(n_layers, 10**9), 4, 2, 320, 128)
    (tmp_path / "deep.bin").write_bytes(header * 50)
    with pytest.raises(InputError):
        load_pretrained(tmp_path / "deep.bin")


@pytest.mark.parametrize("repeats", [False, True])
def test_expanded_and_repeated_tensors_are_refused(tmp_path, repeats):
    saved = {"wide": torch.zeros(1).expand(1_000_000, 2048)}
    if repeats:
        saved = dict.fromkeys(map(str, range(100)), torch.zeros(100_000))
    torch.save(saved, tmp_path / "x.pt")
    with pytest.raises(InputError, match="refused"):
        read_checkpoint(tmp_path / "x.pt")


def test_compressed_records_are_refused(tmp_path):
    torch.save({"x": torch.zeros(1_000_000)}, tmp_path / "zeros.pt")
    small = rewritten(tmp_path / "zeros.pt", zipfile.ZIP_DEFLATED)
    assert small.stat().st_size < 20_000
    with pytest.raises(InputError, match="compressed"):
        read_checkpoint(small)
    assert "x" in read_checkpoint(rewritten(tmp_path / "zeros.pt"))


def test_records_that_overlap_or_share_a_name_are_refused(tmp_path):
    torch.save({"x": torch.zeros(1000), "y": torch.ones(1000)}, tmp_path / "two.pt")
    content = (tmp_path / "two.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "two.pt") as archive:
        first, second = (archive.getinfo(f"two/data/{i}") for i in (0, 1))
        start = archive.start_dir
    old, new = (struct.pack("<I", info.header_offset) for info in (second, first))
    (tmp_path / "overlap.pt").write_bytes(content[:start] + content[start:].replace(old, new, 1))
    (tmp_path / "twice.pt").write_bytes(content.replace(b"two/data/1", b"two/data/0"))
    for name, word in (("overlap.pt", "overlaps"), ("twice.pt", "same name")):
        with pytest.raises(InputError, match=word):
            read_checkpoint(tmp_path / name)


@pytest.mark.skipif(sys.platform == "win32", reason="Unix's devices")
@pytest.mark.parametrize("make", ["mkfifo", "mkdir"])
def test_only_files_are_opened(tmp_path, run_cli, make):
    getattr(os, make)(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="not a file"):
        read_checkpoint(tmp_path / "other")
    code, _, err = run_cli("--pretrained-model-path", str(tmp_path / "other"))
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1


# Other files and tensors


def test_files_of_older_pytorch_are_named(tmp_path):
    torch.save({"x": torch.zeros(1)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"old.pt: refused, not written by PyTorch 1.6 or later"):
        read_checkpoint(tmp_path / "old.pt")


def test_ordinary_values_and_tensors_load(tmp_path):
    base = torch.arange(24.0).view(4, 6)
    values = {
        "text": "ü", "none": None, "numbers": [1, -2, 2**70, 1.5, True, 1 + 2j], "set": {1, "a"},
        "bytes": b"\x00\xff", "size": torch.Size([2, 3]), "dtype": torch.bfloat16,
        "device": torch.device("cpu"), 5: (1, (2, 3)),
    }  # fmt: skip
    tensors = {
        "slice": base[1:, ::2], "transposed": base.t(), "row": base[0], "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3), "parameter": torch.nn.Parameter(torch.ones(2)),
        "bool": torch.tensor([True]), "complex": torch.ones(2, dtype=torch.complex64),
        "float8": torch.ones(4).to(torch.float8_e4m3fn), "uint16": torch.ones(3).to(torch.uint16),
    }  # fmt: skip
    saved = values | tensors | {"state": torch.nn.Linear(2, 2).state_dict()}
    torch.save(saved, tmp_path / "x.pt")
    for mapped in (False, True):
        loaded = read_checkpoint(tmp_path / "x.pt", mapped=mapped)
        assert all(loaded[name] == value for name, value in values.items())
        for name, tensor in tensors.items():
            assert loaded[name].dtype == tensor.dtype
            assert torch.equal(loaded[name], tensor)


@pytest.mark.filterwarnings("ignore")
def test_other_kinds_of_tensors_are_refused(tmp_path):
    for tensor in (
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        torch.ones(3).to_sparse(),
        torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        torch.ones(3, device="meta"),
    ):
        torch.save({"x": tensor}, tmp_path / "x.pt")
        with pytest.raises(InputError, match="refused"):
            read_checkpoint(tmp_path / "x.pt")


# Out of memory


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_an_intact_file_is_not_called_damaged_when_memory_runs_out(tmp_path):
    """Its mapping or its copy does not fit the memory that the process may use."""
    config = LlamaConfig(vocab_size=320, n_layers=8)  # 50 MB in bfloat16
    shapes = shapes_of(config).items()
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes}
    pt.save(Checkpoint(config, tensors, "zeros"), tmp_path / "large.pt")
    # First too little for the file, then enough for it but not for float32.
    script = (
        "import contextlib, resource, sys\n"
        "from llama import load_pretrained\n"
        "from minllama.checkpoints import formats\n"
        "from minllama.common.program import run_script\n"
        "for room in (30_000_000, 110_000_000):\n"
        "    used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.RLIM_INFINITY))\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        run_script(lambda: load_pretrained(sys.argv[1], init_weights=False))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "large.pt")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stderr.splitlines()
    assert len(lines) == 2, done.stderr
    for line in lines:
        assert line.startswith("error: out of memory: ") and "asked for while loading" in line
        assert "damaged" not in line
