"""Make and check the zip file that is handed in.

python prepare_submit.py DIR ID         write ID.zip from the folder DIR, then check it
python prepare_submit.py FILE.zip ID    only check
"""

import lzma
import os
import re
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from minllama.common.errors import InputError
from minllama.common.files import atomic_write
from minllama.common.program import ArgumentParser, run_script

N_LINES = {  # of the assignment's data
    **{("sst", "dev"): 1101, ("sst", "test"): 2210},
    **{("cfimdb", "dev"): 245, ("cfimdb", "test"): 488},
}
N_LABELS = {"sst": 5, "cfimdb": 2}
REQUIRED = [
    "run_llama.py",
    "llama.py",
    "optimizer.py",
    "classifier.py",
    "rope.py",
    "generated-sentence-temp-0.txt",
    "generated-sentence-temp-1.txt",
    *(
        f"{dataset}-{split}-{kind}-output.txt"
        for dataset, split in N_LINES
        for kind in ("prompting", "finetuning")
    ),
]
ADVANCED = [f"{dataset}-{split}-advanced-output.txt" for dataset, split in N_LINES]

EXCLUDED_SUFFIXES = {
    *(".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".onnx", ".gguf", ".h5", ".npz"),  # weights
    *(".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".whl"),  # archives
    *(".pyc", ".pyo"),
}
EXCLUDED_FOLDERS = {"__pycache__", "venv", "env", "node_modules"}
STATE_SUFFIX = ".state"  # of the folder of an interrupted fine-tuning run
MARKERS = ("pyvenv.cfg", "pretrain.json")  # files of a virtual environment and a run folder
MAX_BYTES = 2 * 10**8  # of all files together
DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, OSError),
    *(RuntimeError, NotImplementedError, ValueError),  # encrypted, unknown, not UTF-8
)


def collect(folder: Path) -> Iterator[Path]:
    """The files to hand in: no weights, environments, runs, caches, archives or hidden files.

    Raises:
        AssertionError: one of them is a link, which may point to anything.
    """
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_excluded_folder(Path(root, name)))
        wanted = sorted(
            name
            for name in files
            if Path(name).suffix.lower() not in EXCLUDED_SUFFIXES and not name.startswith(".")
        )
        for path in (Path(root, name) for name in (*folders, *wanted)):
            if path.is_symlink():
                raise AssertionError(f"{path} is a link; put what it points to in its place")
        yield from filter(Path.is_file, (Path(root, name) for name in wanted))


def is_excluded_folder(path: Path) -> bool:
    """Whether nothing in a folder is handed in."""
    if path.name in EXCLUDED_FOLDERS or path.name.startswith("."):
        return True
    return path.name.endswith(STATE_SUFFIX) or any((path / name).exists() for name in MARKERS)


def make_zip(folder: Path, aid: str) -> Path:
    """Write `ID.zip` in the working folder, everything in it under the one folder `ID`.

    Raises:
        AssertionError: something is missing or wrong; an older zip file then remains.
    """
    target = Path(f"{aid}.zip")
    if target.is_symlink() or (target.exists() and not target.is_file()):
        raise AssertionError(f"{target} is a link, a folder or a device; move it away")
    files = {f"{aid}/{path.relative_to(folder).as_posix()}": path for path in collect(folder)}
    check_names(list(files), aid, folder)
    with atomic_write(target, "wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive:
            for name, path in files.items():
                archive.write(path, name)
        file.flush()
        check_file(file.name, aid, source=folder)
    return target


def check_names(names: list[str], aid: str, source: str | Path) -> None:
    """Check that a submission with these member names is complete and safe to unpack.

    Args:
        names: those of folders end in a slash.
        source: the zip file or folder, for the message.

    Raises:
        AssertionError: it is not; the message names what is wrong.
    """
    for name in names:
        if (
            not name.isprintable()  # also if it was not UTF-8
            or any(sign in name for sign in "\\:")
            or not {"", ".", ".."}.isdisjoint(name.removesuffix("/").split("/"))
        ):
            raise AssertionError(f"{source} holds the unsafe path {name!r}")
    outside = [name for name in names if not name.startswith(f"{aid}/")]
    if outside:
        raise AssertionError(f"{source} must hold one folder {aid}; outside it is {outside[0]!r}")
    check_collisions(names, source)
    present = {name.removeprefix(f"{aid}/") for name in names}
    missing = [name for name in REQUIRED if name not in present]
    if missing:
        raise AssertionError(f"{source} lacks {', '.join(missing)}")
    missing = [name for name in ADVANCED if name not in present]
    if 0 < len(missing) < len(ADVANCED):
        raise AssertionError(
            f"{source} has some advanced outputs but lacks {', '.join(missing)}; all four or none"
        )


def check_collisions(names: Iterable[str], source: str | Path) -> None:
    """Check that no two members would be unpacked to one path, on any system.

    Raises:
        AssertionError: two would.
    """
    taken: dict[str, str] = {}  # by path as a system without upper case reads it
    for name in names:
        parts = name.removesuffix("/").split("/")
        path = "/".join(unicodedata.normalize("NFC", part).rstrip(". ") for part in parts)
        path = path.casefold()
        if path in taken:
            raise AssertionError(f"{source} holds {name!r} besides {taken[path]!r}; keep one")
        taken[path] = name
    for path, name in taken.items():
        folder = taken.get(path.rpartition("/")[0], "/")
        if not folder.endswith("/"):
            raise AssertionError(f"{source} holds {name!r}, but {folder!r} is a file")


def check_file(file: str | Path, aid: str, source: str | Path | None = None) -> None:
    """Check that a zip file is undamaged, complete and safe to unpack as a submission.

    Args:
        source: the name in messages; by default the file.

    Raises:
        AssertionError: it is not; the message names what is wrong.
    """
    source = file if source is None else source
    members, contents = read_zip(file, aid, source)
    for member in members:
        check_member(member, source)
    check_names([member.filename for member in members], aid, source)
    for name, content in contents.items():
        if not content:
            raise AssertionError(f"{source} has an empty {name}")
    for dataset, split in N_LINES:
        for kind in ("prompting", "finetuning", "advanced"):
            name = f"{dataset}-{split}-{kind}-output.txt"
            if name in contents:
                check_predictions(contents[name], dataset, split, f"{source} has a {name}")


def read_zip(
    file: str | Path, aid: str, source: str | Path
) -> tuple[list[zipfile.ZipInfo], dict[str, bytes]]:
    """Read the members of a zip file, and the contents of those that the assignment names.

    Raises:
        AssertionError: it is damaged, encrypted or too large.
    """
    if not zipfile.is_zipfile(file):
        raise AssertionError(f"{source} is not a zip file")
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            size = sum(member.file_size for member in members)
            if size > MAX_BYTES:
                raise AssertionError(f"{source} holds {size:,} bytes, more than {MAX_BYTES:,}")
            damaged = archive.testzip()
            if damaged:
                raise AssertionError(f"{source} is damaged: {damaged} cannot be read")
            present = set(archive.namelist())
            names = [name for name in REQUIRED + ADVANCED if f"{aid}/{name}" in present]
            return members, {name: archive.read(f"{aid}/{name}") for name in names}
    except DAMAGE as error:
        raise AssertionError(f"{source} is damaged or encrypted: {error}") from error


def check_member(member: zipfile.ZipInfo, source: str | Path) -> None:
    """Check that a member of a zip file is a plain file or a folder.

    Raises:
        AssertionError: it is a link, a pipe, or a folder with the name of a file.
    """
    kind = stat.S_IFMT(member.external_attr >> 16)  # 0 if the system has no such kinds
    marked_folder = bool(member.external_attr & 0x10)  # as Windows marks one
    expected = stat.S_IFDIR if member.is_dir() else stat.S_IFREG
    if kind not in (0, expected) or (marked_folder and not member.is_dir()):
        raise AssertionError(f"{source} holds {member.filename!r}, which is no plain file")


def check_predictions(content: bytes, dataset: str, split: str, file: str) -> None:
    """Check that a file has a line `prediction ||| sentence` for each line of its data.

    The data are `data/DATASET-SPLIT.txt`; if that is absent, the assignment's.

    Args:
        file: the beginning of the message.

    Raises:
        AssertionError: it has not.
    """
    data, expected = Path("data", f"{dataset}-{split}.txt"), N_LINES[dataset, split]
    if data.is_file():
        expected = len(data.read_bytes().splitlines())
    lines = content.splitlines()
    if len(lines) != expected:
        raise AssertionError(
            f"{file} of {len(lines)} lines, but {data.as_posix()} has {expected}; write it anew"
        )
    labels = {str(label).encode() for label in range(N_LABELS[dataset])}
    for number, line in enumerate(lines, start=1):
        label, separator, _ = line.partition(b"|||")
        if not separator or label.strip() not in labels:
            raise AssertionError(
                f"{file} whose line {number} is not 'prediction ||| sentence' with a prediction "
                f"from 0 to {len(labels) - 1}; write it anew"
            )


def main(path: str | Path, aid: str) -> None:
    """Make the zip file if `path` is a folder; check it.

    Raises:
        AssertionError: something is wrong with it; the message says what.
    """
    aid = aid.strip()
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", aid):
        raise AssertionError(f"the ID {aid!r} cannot name a folder: letters, digits and _.+- only")
    path = Path(path)
    if path.is_dir():
        target = make_zip(path, aid)
        print(f"Submission zip file created from DIR={path} for {aid}: {target}")
    elif path.is_file():
        target = path
        check_file(target, aid)
    else:
        raise AssertionError(f"{path}: no such file or folder")
    print(f"{target} is a complete submission for {aid}.")


def run() -> None:
    parser = ArgumentParser(description="Make and check the zip file that is handed in.")
    parser.add_argument("path", help="a folder to hand in, or a zip file to check")
    parser.add_argument("id", help="your ID, the name of the zip file and of the folder in it")
    args = parser.parse_args()
    try:
        main(args.path, args.id)
    except AssertionError as error:
        raise InputError(str(error)) from error


if __name__ == "__main__":
    run_script(run)
