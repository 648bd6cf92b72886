"""Checks of a file that `torch.save` wrote, made before PyTorch reads it.

`torch.load(weights_only=True)` runs no code, but it ignores checksums, and a few bytes can make it
allocate any amount of memory. So the checksums are compared here, and the pickle is first read with
its tensors on the meta device, which takes no memory.
"""

import io
import pickle
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any, ClassVar, NoReturn

import torch
from torch.storage import _dtype_to_storage_type_map as storage_names

from minllama.common.errors import InputError, is_out_of_memory
from minllama.common.files import refuse_lfs_pointer
from minllama.common.progress import progress_bar

MAX_PICKLE = 4 * 2**20  # bytes; enough for a model of 1000 layers and its optimizer
MAX_VALUES, MAX_DEPTH = 1_000_000, 100
ZIP_MAGIC, ZIP_HEADER, ENCRYPTED = b"PK\x03\x04", 30, 1  # the header's bytes, and a flag in it
UNKNOWN = "not a checkpoint of tensors and plain values, and loading anything else could run code"


def check(path: str | Path) -> None:
    """Check that a file is intact, and that loading it takes no more memory than its size.

    Raises:
        InputError: the file is damaged, or holds something else than tensors and plain values.
    """
    path = Path(path)
    refuse_lfs_pointer(path)
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            value = read_zip(file) if is_zip(path) else refuse_other_file(file)
        check_values(value, size)
    except UnpicklingError as error:
        raise InputError(f"{path}: refused, {error}") from error
    except zipfile.BadZipFile as error:
        remedy = "copy or fetch it again (`bash setup.sh` does for stories42M.pt)"
        raise InputError(f"{path}: damaged or incomplete, {error}; {remedy}") from error
    except Exception as error:  # of zipfile, pickle or torch, for bytes that make no sense
        if isinstance(error, OSError) or is_out_of_memory(error):
            raise
        raise InputError(f"{path}: refused, it is damaged or {UNKNOWN}") from error


def is_zip(path: str | Path) -> bool:
    """Whether PyTorch reads a file as a zip, which its first bytes decide."""
    with Path(path).open("rb") as file:
        return file.read(len(ZIP_MAGIC)) == ZIP_MAGIC


def read_zip(file: IO[bytes]) -> Any:
    """Check the records of a file of PyTorch 1.6 or later, and read the outline of its pickle."""
    if not zipfile.is_zipfile(file):
        raise zipfile.BadZipFile("its end is missing")
    archive = zipfile.ZipFile(file)
    records = archive.infolist()
    check_layout(records, archive.start_dir)
    pickles = [record for record in records if record.filename.endswith("/data.pkl")]
    for record in progress_bar(records, desc="verify", unit=" records", delay=1):
        with archive.open(record) as content:
            while content.read(1 << 20):  # at the end zipfile compares the CRC-32
                pass
    if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE:
        raise UnpicklingError("it is a zip, but not one of torch.save")
    outline = OutlineReader(io.BytesIO(archive.read(pickles[0])))
    value = outline.load()
    for key, n_bytes in outline.storages:
        name = pickles[0].filename.removesuffix(".pkl") + f"/{key}"
        if archive.getinfo(name).file_size != n_bytes:
            raise UnpicklingError(f"its record {name} has another size than its tensors")
    return value


def check_layout(records: list[zipfile.ZipInfo], end: int) -> None:
    """Check that records are stored as they are, lie before `end`, and do not overlap."""
    if len({record.filename.casefold() for record in records}) < len(records):
        raise UnpicklingError("it has two records of the same name")
    for record in sorted(records, key=lambda record: record.header_offset, reverse=True):
        is_stored = record.compress_type == zipfile.ZIP_STORED and not record.flag_bits & ENCRYPTED
        if not is_stored or record.file_size != record.compress_size:
            raise UnpicklingError(f"its record {record.filename} is compressed; save it again")
        if not 0 <= record.header_offset <= end - ZIP_HEADER - record.file_size:
            raise UnpicklingError(f"its record {record.filename} overlaps another or lies outside")
        end = record.header_offset


def refuse_other_file(file: IO[bytes]) -> NoReturn:
    """Say what a file is that PyTorch 1.6 or later did not write."""
    start = file.read(512).lstrip()
    if not start or start.startswith(b"<"):
        raise zipfile.BadZipFile("a web page, not a checkpoint" if start else "an empty file")
    raise UnpicklingError(f"not written by PyTorch 1.6 or later; it is {UNKNOWN}")


def check_values(value: Any, file_size: int) -> None:
    """Check that an outline has few values, and tensors of at most twice the size of the file."""
    stack = [(value, 0)]
    n_values = n_bytes = 0  # a value counts again wherever it is referred to, as a tied head does
    while stack:
        item, depth = stack.pop()
        n_values += 1
        if isinstance(item, torch.Tensor):
            n_bytes += item.nbytes
        elif isinstance(item, list | tuple | dict):
            items = item.values() if isinstance(item, dict) else item
            stack += [(each, depth + 1) for each in items]
        if n_values + len(stack) > MAX_VALUES or depth > MAX_DEPTH:
            raise UnpicklingError("it has more values than any checkpoint, or nested too deeply")
        if n_bytes > 2 * file_size:
            raise UnpicklingError(f"its tensors take more than twice the {file_size:,} bytes of it")


class CheckedDict(dict):
    """A dict with texts and small numbers as keys: to hash others may take very long."""

    def __init__(self, items: Any = ()):
        for key, value in items:
            self[key] = value

    def __setitem__(self, key: Any, value: Any) -> None:
        if type(key) not in (str, bytes, bool) and not (type(key) is int and abs(key) < 2**31):
            raise UnpicklingError("a key in it is neither a text nor a small number")
        super().__setitem__(key, value)


class Attributes(CheckedDict):
    """The attributes of an object in a file, in its place, so that none of its code runs."""

    def __init__(self, *_: Any):
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        for name, value in state.items() if isinstance(state, dict) else ():
            self[name] = value


# Namespaces and states of NumPy's generator, which the assignment's fine-tuned files have.
REPLACED: list[Any] = [
    *((Attributes, name) for name in ("argparse.Namespace", "types.SimpleNamespace")),
    *((Attributes, f"numpy.{name}") for name in ("ndarray", "dtype")),
    *((Attributes, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
]


def rebuild_tensor(storage: Any, offset: int, size: Any, stride: Any, *more: Any) -> torch.Tensor:
    """`torch._utils._rebuild_tensor` and its `_v2` and `_v3` (with a dtype) on the meta device."""
    dtype = next((value for value in more if isinstance(value, torch.dtype)), storage.dtype)
    tensor = torch.empty_strided(size, stride, dtype=dtype, device="meta")
    end = offset * dtype.itemsize + tensor.untyped_storage().nbytes()
    if offset < 0 or (tensor.nbytes and max(end, tensor.nbytes) > storage.nbytes):
        raise UnpicklingError("it has a tensor of more elements than are stored for it")
    return tensor


def encode(text: str, encoding: str) -> str:
    if encoding != "latin1":  # which pickled bytes use; others can make a text much longer
        raise UnpicklingError(UNKNOWN)
    return text


class OutlineReader(pickle._Unpickler):  # the one in Python, whose instructions can be replaced
    """Reads a pickle of few instructions and names, with tensors on the meta device."""

    OPCODES = """PROTO STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT
        BINUNICODE SHORT_BINSTRING EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
        SETITEM SETITEMS BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL REDUCE NEWOBJ BINPERSID"""
    GLOBALS: ClassVar[dict[str, Any]] = {
        **{f"torch.{name}": x for name, x in vars(torch).items() if isinstance(x, torch.dtype)},
        **{f"torch.{name}": dtype for dtype, name in storage_names().items()},
        "torch.storage.UntypedStorage": torch.uint8,
        **{f"torch._utils._rebuild_tensor{v}": rebuild_tensor for v in ("", "_v2", "_v3")},
        "torch._utils._rebuild_parameter": lambda data, *_: data,
        "torch.Size": tuple,
        "torch.device": lambda *_: None,
        "collections.OrderedDict": CheckedDict,
        "builtins.set": lambda items: CheckedDict((item, None) for item in items),
        "builtins.complex": complex,
        "_codecs.encode": encode,
        **{name: replacement for replacement, name in REPLACED},
    }
    stack: list[Any]

    def __init__(self, file: IO[bytes]):
        super().__init__(file, encoding="latin1")
        self.storages: set[tuple[str, int]] = set()  # keys, and sizes in bytes

    def load_empty_dict(self) -> None:
        self.stack.append(CheckedDict())

    def load_build(self) -> None:
        state = self.stack.pop()  # of an OrderedDict nobody reads it
        if isinstance(self.stack[-1], Attributes):
            self.stack[-1].__setstate__(state)
        elif not isinstance(self.stack[-1], CheckedDict):
            raise UnpicklingError(UNKNOWN)

    dispatch: ClassVar[dict[int, Any]] = {
        opcode[0]: pickle._Unpickler.dispatch[opcode[0]]
        for opcode in (getattr(pickle, name) for name in OPCODES.split())
    } | {pickle.EMPTY_DICT[0]: load_empty_dict, pickle.BUILD[0]: load_build}

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}".replace("__builtin__", "builtins").replace(".cuda.", ".")
        if full_name not in self.GLOBALS:
            raise UnpicklingError(f"it names {module}.{name}; it is {UNKNOWN}")
        return self.GLOBALS[full_name]

    def persistent_load(self, pid: Any) -> torch.Tensor:
        name, dtype, key, _device, n_elements, *_view = pid
        if name != "storage" or type(key) is not str:
            raise UnpicklingError(UNKNOWN)
        storage = torch.empty(n_elements, dtype=dtype, device="meta")
        self.storages.add((key, storage.nbytes))
        return storage
