"""What `torch.save` wrote, checked before PyTorch reads it: it is whole, and as large as it says.

PyTorch's reader runs no code with `weights_only=True`. But it does not compare the checksums of a
zip, and a few bytes make it ask for any amount of memory. So the pickle inside is first read here,
to an outline in which a tensor is only its size, with nothing but plain values and plain tensors.
"""

import io
import math
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from minllama.common.errors import InputError
from minllama.common.progress import Bar

ZIP = b"PK\x03\x04"
LARGE = 10**9  # bytes; the checksums of larger files are compared only where that is asked for
LARGEST_PICKLE = 4 * 2**20  # bytes; that of a model of 1000 layers and its optimizer
MOST_VALUES, DEEPEST = 1_000_000, 100
LOCAL_HEADER = 30  # bytes of it before a record's name
OLD_MAGIC, OLD_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of PyTorch before 1.6, without a zip
DAMAGE = (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, EOFError)
DAMAGE += (OverflowError, RuntimeError, LookupError, TypeError, AttributeError)


class Refused(Exception):
    """What a file holds, although it is whole, that is not loaded."""


class Damaged(Exception):
    """What shows that a file is not as it was written."""


def check(path: str | Path, *, verify: bool = False) -> None:
    """See that loading a file takes no more memory than the file, and that nothing in it changed.

    Args:
        verify: compare the checksums of a file of over 1 GB too.

    Raises:
        InputError: the file is damaged, or holds something else than tensors and plain values.
    """
    path = Path(path)
    size = path.stat().st_size
    again = "`bash setup.sh` fetches it again" if path.name == "stories42M.pt" else None
    try:
        with path.open("rb") as file:
            if is_zip(path):
                check_zip(file, size, verify or size <= LARGE)
            else:
                check_old(file, size)
    except Refused as error:
        raise InputError(f"{path}: refused, {error}") from error
    except Damaged as error:
        raise InputError(f"{path}: {error}; {again or 'copy or fetch it again'}") from error


def is_zip(path: str | Path) -> bool:
    """Whether PyTorch takes a file for a zip, which it tells by the beginning."""
    with Path(path).open("rb") as file:
        return file.read(len(ZIP)) == ZIP


def check_zip(file: IO[bytes], size: int, with_sums: bool) -> None:
    """Check a file of PyTorch 1.6 or later."""
    try:
        if not zipfile.is_zipfile(file):
            raise Damaged(f"incomplete, only its first {size:,} bytes are here")
        archive = zipfile.ZipFile(file)
    except DAMAGE as error:
        raise Damaged("a damaged checkpoint, the list of its records cannot be read") from error
    records = records_of(archive)
    if with_sums:
        compare_sums(archive)
    pickles = [name for name in records if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise Refused("a zip, but not one that torch.save wrote")
    if records[pickles[0]] > LARGEST_PICKLE:
        raise Refused(f"it lists values in {records[pickles[0]]:,} bytes, as no checkpoint does")
    folder = pickles[0].removesuffix("data.pkl")

    def storage(kind: Any, key: Any, location: Any, n: Any) -> Storage:
        stored = Storage.of(kind, n)
        if records.get(f"{folder}data/{key}") != stored.n_bytes:
            raise Refused(f"its record {folder}data/{key} has another size than its tensors")
        return stored

    content = io.BytesIO(read(archive, archive.getinfo(pickles[0])))
    try:
        value = outline(content, storage)
    except DAMAGE as error:
        raise Refused(NOT_A_CHECKPOINT) from error
    check_values(value, size)


def records_of(archive: zipfile.ZipFile) -> dict[str, int]:
    """The records of a zip and their sizes, which together are not more than the file."""
    found = sorted(archive.infolist(), key=lambda record: record.header_offset)
    ends = [*(record.header_offset for record in found[1:]), archive.start_dir]
    for record, end in zip(found, ends, strict=True):
        is_plain = record.compress_type == zipfile.ZIP_STORED and not record.flag_bits & 1
        if not is_plain or record.file_size != record.compress_size:
            raise Refused(
                f"its record {record.filename} is compressed, which torch.save never does; save it "
                "again with torch.save"
            )
        if not 0 <= record.header_offset <= end - LOCAL_HEADER - record.file_size:
            raise Refused(f"its record {record.filename} overlaps another, or lies outside")
    records = {record.filename: record.file_size for record in found}
    if len({name.casefold() for name in records}) < len(found):
        raise Refused("it has two records of the same name")
    return records


def compare_sums(archive: zipfile.ZipFile) -> None:
    """Compare every record with its checksum."""
    progress = {"desc": "verify", "unit": " records", "delay": 1}
    for record in Bar(archive.infolist(), **progress):
        read(archive, record, keep=False)


def read(archive: zipfile.ZipFile, record: zipfile.ZipInfo, *, keep: bool = True) -> bytes:
    """A record, compared with its checksum.

    Args:
        keep: False reads it in pieces and returns nothing.
    """
    try:
        with archive.open(record) as content:
            if keep:
                return content.read()
            while content.read(1 << 20):
                pass
            return b""
    except DAMAGE as error:
        raise Damaged(
            f"a damaged checkpoint, its record {record.filename} is not as its checksum says"
        ) from error


def check_old(file: IO[bytes], size: int) -> None:
    """Check a file of PyTorch before 1.6: pickles one after the other, then the storages."""
    content = io.BytesIO(file.read(LARGEST_PICKLE))
    start = content.getvalue()[:512].lstrip()
    if not start:
        raise Damaged("an empty file, not a checkpoint")
    if start.startswith(b"<"):
        raise Damaged("a web page, not a checkpoint")
    storages: dict[Any, Storage] = {}

    def storage(kind: Any, key: Any, location: Any, n: Any, view: Any) -> Storage:
        whole = storages.setdefault(plain_key(key), Storage.of(kind, n))
        if view is None:
            return whole
        _, offset, n_of_view = view
        part = Storage.of(kind, n_of_view)
        if sizes((offset,))[0] * whole.item_size + part.n_bytes > whole.n_bytes:
            raise Refused("it has a view of more than there is")
        return part

    try:
        magic, protocol, _system = (outline(content, storage) for _ in range(3))
        if (magic, protocol) != (OLD_MAGIC, OLD_PROTOCOL):
            raise ValueError("the first pickle is another")
        value = outline(content, storage)
    except DAMAGE as error:
        raise Refused(NOT_A_CHECKPOINT) from error
    if sum(stored.n_bytes for stored in storages.values()) > size:
        raise Damaged(f"incomplete, only its first {size:,} bytes are here")
    check_values(value, size)


NOT_A_CHECKPOINT = (
    "it is not a checkpoint of tensors and plain values, and loading anything else could run code"
)


class Storage(NamedTuple):
    """Of a storage: how many bytes an element has, and all of them."""

    item_size: int
    n_bytes: int

    @classmethod
    def of(cls, kind: Any, n: Any) -> "Storage":
        if not isinstance(kind, Kind):
            raise Refused("it has a storage of no type")
        return cls(kind.item_size, kind.item_size * sizes((n,))[0])


class Kind(NamedTuple):
    """What a type of elements or storages means here."""

    item_size: int


class Tensor(NamedTuple):
    """Of a tensor: how many bytes its elements take."""

    n_bytes: int


def outline(file: IO[bytes], storage: Any) -> Any:
    """Read the next pickle of a file without making what it describes.

    It knows the instructions that PyTorch's reader knows, but for making objects of classes.

    Args:
        storage: gives the `Storage` for the arguments of a reference to one.

    Returns:
        plain values, lists, tuples and dicts, with a `Tensor` for each tensor.
    """
    stack: list[Any] = []
    marked: list[list[Any]] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        nonlocal stack
        items, stack = stack, marked.pop()
        return items

    for instruction, argument, _ in pickletools.genops(file):
        match instruction.name:
            case "PROTO":
                if argument != 2:
                    raise Refused(NOT_A_CHECKPOINT)
            case "MARK":
                marked.append(stack)
                stack = []
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[instruction.name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "BINUNICODE" | "SHORT_BINSTRING":  # the second is text of Python 2
                stack.append(argument)
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "TUPLE":
                items = since_mark()
                stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                n = int(instruction.name[-1])
                stack[-n:] = [tuple(stack[-n:])]
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS":
                items = since_mark()
                stack[-1].extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                stack[-1][plain_key(key)] = value
            case "SETITEMS":
                items = since_mark()
                for key, value in zip(items[::2], items[1::2], strict=True):
                    stack[-1][plain_key(key)] = value
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(meaning_of(argument.replace(" ", ".")))
            case "REDUCE":
                arguments = stack.pop()
                stack[-1] = stack[-1](*arguments)
            case "BUILD":  # attributes of an OrderedDict, which nobody reads
                stack.pop()
                if not isinstance(stack[-1], dict):
                    raise Refused(NOT_A_CHECKPOINT)
            case "BINPERSID":
                kind, *arguments = stack.pop()
                if kind not in ("storage", b"storage"):
                    raise Refused(NOT_A_CHECKPOINT)
                stack.append(storage(*arguments))
            case "STOP":
                return stack.pop()
            case _:
                raise Refused(NOT_A_CHECKPOINT)
    raise EOFError


def meaning_of(name: str) -> Any:
    """What stands in an outline for a function or a type that a pickle names."""
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    module, _, short = name.rpartition(".")
    if module in ("torch", "torch.storage", "torch.cuda") and short.endswith("Storage"):
        if short == "UntypedStorage":
            return Kind(1)
        if short in STORAGES:
            return Kind(STORAGES[short].itemsize)
    if module == "torch" and isinstance(getattr(torch, short, None), torch.dtype):
        return Kind(getattr(torch, short).itemsize)
    raise Refused(f"it names {name}; {NOT_A_CHECKPOINT}")


STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}


def tensor(storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> Tensor:
    """`torch._utils._rebuild_tensor`, its v2, and its v3, which has a type of elements too."""
    if not isinstance(storage, Storage):
        raise Refused("it has a tensor without a storage")
    kinds = [value.item_size for value in more if isinstance(value, Kind)]
    item_size = kinds[0] if kinds else storage.item_size
    size, stride, (offset,) = sizes(size), sizes(stride), sizes((offset,))
    n_bytes = math.prod(size) * item_size
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if n_bytes and (n_bytes > storage.n_bytes or (last + 1) * item_size > storage.n_bytes):
        raise Refused("it has a tensor of more elements than are stored for it")
    return Tensor(n_bytes)


def parameter(data: Any, *_: Any) -> Any:
    """`torch._utils._rebuild_parameter`."""
    return data


def ordered_dict(items: Any = ()) -> dict:
    return {plain_key(key): value for key, value in items}


def plain_set(items: Any) -> list:
    return [plain_key(item) for item in items]


def text_as_bytes(text: Any, encoding: Any = "latin1") -> Any:
    """`_codecs.encode`, by which protocol 2 has bytes."""
    if type(text) is not str or encoding != "latin1":
        raise Refused(NOT_A_CHECKPOINT)
    return text


def device(*_: Any) -> None:
    return None


def shape(items: Any = ()) -> tuple:
    return tuple(items)


FUNCTIONS = {
    "collections.OrderedDict": ordered_dict,
    "torch._utils._rebuild_tensor": tensor,
    "torch._utils._rebuild_tensor_v2": tensor,
    "torch._utils._rebuild_tensor_v3": tensor,
    "torch._utils._rebuild_parameter": parameter,
    "torch.Size": shape,
    "torch.device": device,
    "_codecs.encode": text_as_bytes,
    "builtins.set": plain_set,
    "__builtin__.set": plain_set,
    "builtins.complex": complex,
    "__builtin__.complex": complex,
}


def plain_key(key: Any) -> Any:
    """A key of a dict, which is a text or a small number: others may take very long to compare."""
    if type(key) in (str, bytes, bool) or (type(key) is int and abs(key) < 2**31):
        return key
    raise Refused("a key in it is neither a text nor a small number")


def sizes(values: Any) -> tuple[int, ...]:
    """Values that count something."""
    if not all(type(value) is int and value >= 0 for value in values):
        raise Refused("a size in it is not a whole number, or negative")
    return tuple(values)


def check_values(value: Any, size: int) -> None:
    """See that there are not many more values, and tensors, than the file is large.

    What is there twice counts twice: a few lists of one another have any number of values. Two of a
    model's tensors are often one, so the tensors may have twice the bytes of the file.

    Args:
        size: of the file, in bytes.
    """
    waiting = [(value, 0)]
    n_values = n_bytes = 0
    while waiting:
        item, depth = waiting.pop()
        n_values += 1
        if isinstance(item, Tensor):
            n_bytes += item.n_bytes
        elif isinstance(item, dict | list | tuple) and not isinstance(item, Kind | Storage):
            items = item.values() if isinstance(item, dict) else item
            waiting += [(each, depth + 1) for each in items]
        if n_values + len(waiting) > MOST_VALUES or depth > DEEPEST:
            raise Refused("it has more values than any checkpoint, or they lie too deep")
        if n_bytes > 2 * size:
            raise Refused(f"its tensors have more than twice the {size:,} bytes of the file")
