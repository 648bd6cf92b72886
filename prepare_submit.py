"""Make and check the zip file that is handed in.

python prepare_submit.py DIR ID         write ID.zip from the folder DIR, then check it
python prepare_submit.py FILE.zip ID    only check
"""

import os
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from utils import ArgumentParser, InputError, atomic_write, run_script

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
        for dataset in ("sst", "cfimdb")
        for split in ("dev", "test")
        for kind in ("prompting", "finetuning")
    ),
]
ADVANCED = [
    f"{dataset}-{split}-advanced-output.txt"
    for dataset in ("sst", "cfimdb")
    for split in ("dev", "test")
]

LEFT_OUT_SUFFIXES = {
    *(".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".onnx", ".gguf", ".h5", ".npz"),  # weights
    *(".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".whl"),  # archives
    *(".pyc", ".pyo"),
}
LEFT_OUT_FOLDERS = {"__pycache__", "venv", "env", "node_modules"}


def collect(folder: Path) -> Iterator[Path]:
    """The files to hand in: no weights, environments, caches, archives or hidden files."""
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(
            name
            for name in folders
            if name not in LEFT_OUT_FOLDERS
            and not name.startswith(".")
            and not Path(root, name, "pyvenv.cfg").exists()
        )
        for name in sorted(files):
            path = Path(root, name)
            if (
                path.suffix.lower() not in LEFT_OUT_SUFFIXES
                and not name.startswith(".")
                and path.is_file()
            ):
                yield path


def make_zip(folder: Path, aid: str) -> Path:
    """Write `ID.zip` in the working folder, everything in it under the one folder `ID`.

    Raises:
        AssertionError: something is missing; nothing is written then.
    """
    files = {f"{aid}/{path.relative_to(folder).as_posix()}": path for path in collect(folder)}
    check_names(list(files), aid, folder)
    target = Path(f"{aid}.zip")
    with (
        atomic_write(target, "wb") as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive,
    ):
        for name, path in files.items():
            archive.write(path, name)
    return target


def check_names(names: list[str], aid: str, source: str | Path) -> None:
    """See that a submission of these member names is complete and safe to unpack.

    Args:
        source: the zip file or folder, for the message.

    Raises:
        AssertionError: it is not; the message names what is wrong.
    """
    for name in names:
        if (
            not name.isprintable()  # nor can it be encoded, if it was not UTF-8
            or any(sign in name for sign in "\\:")
            or name.startswith("/")
            or ".." in name.split("/")
        ):
            raise AssertionError(f"{source} holds the unsafe path {name!r}")
    outside = [name for name in names if not name.startswith(f"{aid}/")]
    if outside:
        raise AssertionError(f"{source} must hold one folder {aid}; outside it is {outside[0]!r}")
    present = {name.removeprefix(f"{aid}/") for name in names}
    missing = [name for name in REQUIRED if name not in present]
    if missing:
        raise AssertionError(f"{source} lacks {', '.join(missing)}")
    missing = [name for name in ADVANCED if name not in present]
    if 0 < len(missing) < len(ADVANCED):
        raise AssertionError(
            f"{source} has some advanced outputs but lacks {', '.join(missing)}; all four or none"
        )


def check_file(file: str | Path, aid: str) -> None:
    """See that a zip file is whole, and complete and safe to unpack as a submission.

    Raises:
        AssertionError: it is not; the message names what is wrong.
    """
    if not zipfile.is_zipfile(file):
        raise AssertionError(f"{file} is not a zip file")
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
            names = archive.namelist()
            empty = {info.filename for info in archive.infolist() if not info.file_size}
    except (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, EOFError) as error:
        raise AssertionError(f"{file} is damaged or encrypted: {error}") from error
    if damaged:
        raise AssertionError(f"{file} is damaged: {damaged} cannot be read")
    check_names(names, aid, file)
    for name in REQUIRED:
        if f"{aid}/{name}" in empty:
            raise AssertionError(f"{file} has an empty {name}")


def main(path: str | Path, aid: str) -> None:
    """Make the zip if `path` is a folder; check it.

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
    else:
        raise AssertionError(f"{path}: no such file or folder")
    check_file(target, aid)
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
