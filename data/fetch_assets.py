"""Fetch the assignment's weights, tokenizer, check data and data sets; `setup.sh` runs this.

    .venv/bin/python -m data.fetch_assets

They come from their original addresses, or from `MINLLAMA_ASSETS`, a folder or a base URL that
has the same files under the same names. A file takes its name only after it was checked. What is
there already is left alone, unless it is a broken `stories42M.pt`.
"""

if __name__ == "__main__":  # the imports below take seconds
    from minllama.common.program import end_at_interrupt

    end_at_interrupt()

import contextlib
import hashlib
import http.client
import os
import queue
import signal
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from config import LlamaConfig
from minllama.checkpoints import pt
from minllama.common.errors import InputError
from minllama.common.program import ArgumentParser, run_script

WEIGHTS = "stories42M.pt"
WEIGHTS_URLS = [
    "https://www.cs.cmu.edu/~vijayv/stories42M.pt",
    "https://huggingface.co/karpathy/tinyllamas/resolve/main/stories42M.pt",
]
MOST_WEIGHTS = 400_000_000  # bytes; it has 167 million, or 233 where head and embedding are apart
BASE_URL = "https://raw.githubusercontent.com/neubig/minllama-assignment/master/"
FILES = {  # their bytes and SHA-256
    "tokenizer.model": (
        499_723,
        "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347",
    ),
    "sanity_check.data": (
        289_851,
        "34f7c763a3bb025940029bd970594e985bf69b7ed6e693a8f5cccbef0cee55b0",
    ),
    "data/sst-train.txt": (
        936_994,
        "7aeac81f2a387f2ce7fab98ed8f40ef85cc9c8ad11bcbb63b122e95665cb1f35",
    ),
    "data/sst-dev.txt": (
        121_643,
        "11963c76cd073e68006da0390620aadf5a4b8f775e2f900e92a50b3002e39b9b",
    ),
    "data/sst-test.txt": (
        242_474,
        "bdcc8352d37bdc82113e4a4dd887b824144201539d5a1e49be566232d306a4ba",
    ),
    "data/sst-label-mapping.json": (
        49,
        "831e6914e25d9b9eb56ff9095b3f035bdaf1b9568d385a70ef481c82af0382b3",
    ),
    "data/cfimdb-train.txt": (
        1_629_241,
        "278e200499d1d68a1a9d80e3947a2203cc97130632d8a53f2b9c11de9cb6c699",
    ),
    "data/cfimdb-dev.txt": (
        239_671,
        "b38f0c095c4624e85927116728140e96d0221969b34146f65eae5b5bb24752b8",
    ),
    "data/cfimdb-test.txt": (
        465_946,
        "8ad2f6da7bfb0e8fc36cf89eda47c574cc9c35d6347e665f31bc904d9ecfe0a7",
    ),
    "data/cfimdb-label-mapping.json": (
        16,
        "afeac43f5a5fe8758469078418519df4c8503c2e30e2fcf6c61464fce3d44a36",
    ),
}
TIMEOUT = 20  # seconds without an answer, after which an address is given up
SLOWEST = 10_000  # bytes per second, below which it is too
BLOCK = 1 << 18  # bytes


def sources(name: str) -> list[str]:
    """Where a file may come from, best first: paths and URLs."""
    base = os.environ.get("MINLLAMA_ASSETS")
    if base:
        separator = "" if base.endswith("/") else "/"
        return [base + separator + name]
    return WEIGHTS_URLS if name == WEIGHTS else [BASE_URL + name]


def check(path: Path, name: str) -> None:
    """See whether a file is the one that its name says.

    Raises:
        InputError: it is not.
    """
    if name == WEIGHTS:
        check_weights(path)
        return
    _, expected = FILES[name]
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != expected:
            raise InputError(f"{path}: its SHA-256 is not the original's")


def check_weights(path: Path) -> None:
    """See that a checkpoint has the shape of `stories42M.pt`, then that it is whole.

    In this order, so that no work is done for a shape that fits no memory.

    Raises:
        InputError: it has not.
    """
    saved = pt.read_checkpoint(path, mapped=True)
    with contextlib.suppress(KeyError, TypeError, ValueError):  # `pt.load` says what is wrong
        config = LlamaConfig.from_model_args(saved["model_args"])
        if shape_of(config) != shape_of(LlamaConfig()):
            saved = None
    if saved is None:
        raise InputError(f"{path}: a Llama of another shape than {WEIGHTS}")
    pt.load(path)


def shape_of(config: LlamaConfig) -> tuple[int, ...]:
    """The numbers that the sizes of the tensors depend on."""
    return (config.dim, config.n_layers, config.n_heads, config.vocab_size, config.ffn_dim)


def receive(url: str, blocks: queue.Queue) -> None:
    """Put what an address sends into a queue: its length, blocks of bytes, and None or an error."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            blocks.put(int(response.headers.get("Content-Length", 0)))
            while block := response.read1(BLOCK):
                blocks.put(block)
        blocks.put(None)
    except Exception as error:
        blocks.put(error)


def received(url: str) -> Iterator[int | bytes]:
    """What `receive` gets, as long as it comes fast enough.

    It is received in another thread, since a server that sends single bytes never reaches the
    timeout of a socket. A thread that nobody waits for any more ends with the program.

    Raises:
        TimeoutError: it is too slow.
        OSError, http.client.HTTPException, ValueError: it cannot be received.
    """
    blocks: queue.Queue = queue.Queue(maxsize=16)
    threading.Thread(target=receive, args=(url, blocks), daemon=True).start()
    start, n_bytes = time.monotonic(), 0
    while True:
        try:
            block = blocks.get(timeout=1.5 * TIMEOUT)  # the socket has its own, which tells more
        except queue.Empty:
            raise TimeoutError from None
        if isinstance(block, Exception):
            raise block
        if block is None:
            return
        yield block
        n_bytes += len(block) if isinstance(block, bytes) else 0
        seconds = time.monotonic() - start
        if seconds > TIMEOUT and n_bytes < seconds * SLOWEST:
            raise TimeoutError("too slow")


def read(path: str) -> Iterator[int | bytes]:
    """The length of a file, and its blocks."""
    with open(path, "rb") as file:
        yield os.fstat(file.fileno()).st_size
        while block := file.read(BLOCK):
            yield block


def copy_to(source: str, target: Path, most: int) -> None:
    """Copy a file or download a URL, with a progress bar for what takes long.

    Args:
        target: must not be there.
        most: bytes.

    Raises:
        InputError: there are more, or it is no file.
    """
    is_url = "://" in source
    if not is_url and Path(source).exists() and not Path(source).is_file():
        raise InputError("not a file")
    n_bytes = 0
    with (
        target.open("xb") as file,
        tqdm(desc=target.name, unit="B", unit_scale=True, leave=False, disable=None) as progress,
    ):
        for block in received(source) if is_url else read(source):
            if isinstance(block, int):
                progress.total = block or None
                continue
            n_bytes += len(block)
            if n_bytes > most:
                raise InputError(f"more than {most:,} bytes")
            file.write(block)
            progress.update(len(block))


def partial_of(name: str) -> Path:
    """Where a file stands until it is checked."""
    return Path(name).with_name(f".{Path(name).name}.part")


def fetch(name: str, unreachable: dict[str, str]) -> str | None:
    """Fetch one file.

    Args:
        unreachable: hosts that did not answer before, and what to say of them; they are not tried
            again.

    Returns:
        None, or why it could not be had.
    """
    partial = partial_of(name)
    partial.parent.mkdir(parents=True, exist_ok=True)
    reasons = []
    for source in sources(name):
        try:
            reason = fetch_from(source, name, partial, unreachable)
            if reason is None:
                partial.replace(name)
                return None
            reasons.append(" ".join(reason.split()))
        finally:
            partial.unlink(missing_ok=True)
    return ", ".join(reasons)


def fetch_from(source: str, name: str, partial: Path, unreachable: dict[str, str]) -> str | None:
    """Fetch one file from one place, and check it; None, or why that could not be."""
    host = ""
    try:
        host = urllib.parse.urlsplit(source).netloc
        if host in unreachable:
            return unreachable[host]
        copy_to(source, partial, MOST_WEIGHTS if name == WEIGHTS else FILES[name][0])
        check(partial, name)
        return None
    except InputError as error:
        return f"wrong file at {source}: {str(error).removeprefix(f'{partial}: ')}"
    except urllib.error.HTTPError as error:
        in_circles = 300 <= error.code < 400
        says = f"says {error.code} {str(error.reason)[:40]}"
        return f"{host} {'redirects in circles' if in_circles else says}"
    except (OSError, http.client.HTTPException, ValueError) as error:
        if not host:
            return getattr(error, "strerror", None) or str(error)
        is_slow = str(error) == "too slow"
        unreachable[host] = f"{host} is too slow" if is_slow else f"no answer from {host}"
        return unreachable[host]


def is_wanted(name: str) -> bool:
    """Whether a file is to be fetched: it is absent, or it is a broken copy of the weights."""
    path = Path(name)
    if not path.exists():
        return True
    try:
        check(path, name)
    except (InputError, OSError):
        if name == WEIGHTS:
            print(f"{name} is broken and is fetched again", file=sys.stderr)
            return True
        print(
            f"{name} is not the original and is left as it is; delete it to fetch that",
            file=sys.stderr,
        )
    return False


def main() -> None:
    unreachable: dict[str, str] = {}
    missing: dict[str, list[str]] = {}  # by reason
    for name in [*FILES, WEIGHTS]:
        partial_of(name).unlink(missing_ok=True)  # of a run that was killed
        if is_wanted(name) and (reason := fetch(name, unreachable)):
            missing.setdefault(reason, []).append(name)
    if not missing:
        return
    works = "the three checks, the tests, and run_llama.py with the small model of data/demo"
    names = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in missing.items())
    print(
        f"missing: {names}; {works} work all the same; running setup.sh again tries again",
        file=sys.stderr,
    )


def run() -> None:
    description = "Fetch the assignment's files, from MINLLAMA_ASSETS where that is set."
    ArgumentParser(description=description).parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing half is left
    main()


if __name__ == "__main__":
    run_script(run)
