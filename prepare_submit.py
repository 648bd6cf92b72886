"""Make and check the zip file that is handed in.

python prepare_submit.py DIR ID         write ID.zip from the folder DIR, then check it
python prepare_submit.py FILE.zip ID    only check
"""

import os
import re
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator
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
    ".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".onnx", ".gguf", ".h5", ".npz",  # weights
    ".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".whl",  # archives
    ".pyc", ".pyo",
}  # fmt: skip
EXCLUDED_FOLDERS = {"__pycache__", "venv", "env", "node_modules"}
STATE_SUFFIX = ".state"  # of the folder of an interrupted fine-tuning run
# In the folder of a virtual environment, of a conda environment, and of a pre-training run.
MARKERS = ("pyvenv.cfg", "conda-meta", "pretrain.json")
MAX_BYTES = 2 * 10**8  # of all files together
# Of zipfile; RuntimeError for encrypted files, UnicodeError for names.
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, UnicodeError)


def collect(folder: Path) -> Iterator[Path]:
    """The files to hand in: no weights, environments, runs, caches, archives or hidden files.

    Raises:
        AssertionError: one of them is a link, which may point to anything.
    """
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_excluded_folder(Path(root, name)))
        for path in (Path(root, name) for name in sorted(files)):
            is_wanted = path.suffix.lower() not in EXCLUDED_SUFFIXES and not path.name.startswith(
                "."
            )
            if is_wanted and path.is_symlink():
                raise AssertionError(f"{path} is a link; put what it points to in its place")
            if is_wanted and path.is_file():
                yield path


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
    sizes = {name: path.stat().st_size for name, path in files.items()}
    check_submission(sizes, lambda name: files[name].read_bytes(), aid, folder)
    with (
        atomic_write(target, "wb") as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive,
    ):
        for name, path in files.items():
            archive.write(path, name)
    return target


def check_file(file: str | Path, aid: str) -> None:
    """Check that a zip file is undamaged, complete and safe to unpack as a submission.

    Raises:
        AssertionError: it is not; the message names what is wrong.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = [member for member in archive.infolist() if not is_of_macos(member.filename)]
            for member in members:
                if stat.S_ISLNK(member.external_attr >> 16):
                    raise AssertionError(f"{file} holds the link {member.filename!r}; pack files")
            sizes = {member.filename: member.file_size for member in members}
            check_submission(sizes, archive.read, aid, file)
            damaged = archive.testzip()
            if damaged:
                raise AssertionError(f"{file} is damaged: {damaged} cannot be read")
    except DAMAGE as error:
        raise AssertionError(f"{file} is damaged, encrypted or no zip file: {error}") from error


def is_of_macos(name: str) -> bool:
    """Whether a member is one that macOS' Finder adds by itself."""
    return name.startswith("__MACOSX/") or name.rpartition("/")[2] == ".DS_Store"


def check_submission(
    sizes: dict[str, int], read: Callable[[str], bytes], aid: str, source: str | Path
) -> None:
    """Check that a submission is complete, and that its predictions are of the right data.

    Args:
        sizes: bytes of its files, by their names in the zip file.
        read: gives the content of one of them.
        source: the zip file or folder, for the message.

    Raises:
        AssertionError: something is wrong; the message names it.
    """
    check_names(list(sizes), aid, source)
    total = sum(sizes.values())
    if total > MAX_BYTES:
        largest = sorted(sizes, key=lambda name: sizes[name], reverse=True)[:3]
        names = ", ".join(f"{name} ({sizes[name]:,})" for name in largest)
        raise AssertionError(
            f"{source} holds {total:,} bytes, more than {MAX_BYTES:,}; the largest are {names}; "
            "keep elsewhere what is not handed in"
        )
    for name in REQUIRED + ADVANCED:
        if sizes.get(f"{aid}/{name}") == 0:
            raise AssertionError(f"{source} has an empty {name}")
        if name.endswith("-output.txt") and f"{aid}/{name}" in sizes:
            check_predictions(read(f"{aid}/{name}"), name, source)


def check_names(names: list[str], aid: str, source: str | Path) -> None:
    """Check that a submission with these member names is complete and safe to unpack.

    Args:
        names: names of the members; those of folders end in a slash.
        source: the zip file or folder, for the message.

    Raises:
        AssertionError: it is not; the message names what is wrong.
    """
    taken: dict[str, str] = {}  # by name as Windows and macOS compare them
    for name in names:
        is_odd = not name.isprintable() or "\\" in name or ":" in name  # also if it was not UTF-8
        if is_odd or not {"", ".", ".."}.isdisjoint(name.removesuffix("/").split("/")):
            raise AssertionError(f"{source} holds the unsafe path {name!r}")
        if not name.startswith(f"{aid}/"):
            raise AssertionError(f"{source} must hold one folder {aid}; outside it is {name!r}")
        other = taken.setdefault(name.removesuffix("/").casefold(), name)
        if other is not name:
            raise AssertionError(f"{source} holds {name!r} besides {other!r}; keep one")
    present = {name.removeprefix(f"{aid}/") for name in names}
    missing = [name for name in REQUIRED if name not in present]
    if missing:
        raise AssertionError(f"{source} lacks {', '.join(missing)}")
    missing = [name for name in ADVANCED if name not in present]
    if 0 < len(missing) < len(ADVANCED):
        raise AssertionError(
            f"{source} has some advanced outputs but lacks {', '.join(missing)}; all four or none"
        )


def check_predictions(content: bytes, name: str, source: str | Path) -> None:
    """Check that a file has a line `prediction ||| sentence` for each line of its data.

    The data are `data/DATASET-SPLIT.txt`; if that is absent, the assignment's.

    Raises:
        AssertionError: it has not.
    """
    dataset, split = name.split("-")[:2]
    data, expected = Path("data", f"{dataset}-{split}.txt"), N_LINES[dataset, split]
    if data.is_file():
        expected = len(data.read_bytes().splitlines())
    lines = content.splitlines()
    if len(lines) != expected:
        raise AssertionError(
            f"{source} has a {name} of {len(lines)} lines, but {data.as_posix()} has {expected}; "
            "regenerate it"
        )
    labels = {str(label).encode() for label in range(N_LABELS[dataset])}
    for number, line in enumerate(lines, start=1):
        label, separator, _ = line.partition(b"|||")
        if not separator or label.strip() not in labels:
            raise AssertionError(
                f"{source} has a {name} whose line {number} is not 'prediction ||| sentence' with "
                f"a prediction from 0 to {len(labels) - 1}; regenerate it"
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
