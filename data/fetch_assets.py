"""Fetch the assignment's weights, tokenizer, check data and data sets; `setup.sh` runs this.

    .venv/bin/python -m data.fetch_assets

They come from their original addresses, or from `MINLLAMA_ASSETS`, a folder or a base URL with the
same files under the same names. A file takes its name only after it was checked. Existing files are
left alone, except a broken `stories42M.pt`.
"""

if __name__ == "__main__":  # the imports below take seconds
    from minllama.common.program import end_at_interrupt

    end_at_interrupt()

import hashlib
import http.client
import io
import os
import queue
import signal
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
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
BASE_URL = "https://raw.githubusercontent.com/neubig/minllama-assignment/master/"
SHA256SUMS = """\
9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347  tokenizer.model
34f7c763a3bb025940029bd970594e985bf69b7ed6e693a8f5cccbef0cee55b0  sanity_check.data
7aeac81f2a387f2ce7fab98ed8f40ef85cc9c8ad11bcbb63b122e95665cb1f35  data/sst-train.txt
11963c76cd073e68006da0390620aadf5a4b8f775e2f900e92a50b3002e39b9b  data/sst-dev.txt
bdcc8352d37bdc82113e4a4dd887b824144201539d5a1e49be566232d306a4ba  data/sst-test.txt
831e6914e25d9b9eb56ff9095b3f035bdaf1b9568d385a70ef481c82af0382b3  data/sst-label-mapping.json
278e200499d1d68a1a9d80e3947a2203cc97130632d8a53f2b9c11de9cb6c699  data/cfimdb-train.txt
b38f0c095c4624e85927116728140e96d0221969b34146f65eae5b5bb24752b8  data/cfimdb-dev.txt
8ad2f6da7bfb0e8fc36cf89eda47c574cc9c35d6347e665f31bc904d9ecfe0a7  data/cfimdb-test.txt
afeac43f5a5fe8758469078418519df4c8503c2e30e2fcf6c61464fce3d44a36  data/cfimdb-label-mapping.json
"""
SHA256 = {name: digest for digest, name in map(str.split, SHA256SUMS.splitlines())}
MAX_WEIGHTS = 400_000_000  # bytes; the weights are 167 million, or 233 with a head of their own
MAX_FILE = 10_000_000  # bytes of any other file
TIMEOUT = 20  # seconds without an answer after which an address is given up
MIN_SPEED = 10_000  # bytes per second
BLOCK = 1 << 18  # bytes


def sources(name: str) -> list[str]:
    """Paths and URLs of a file, the best first."""
    base = os.environ.get("MINLLAMA_ASSETS")
    if base:
        separator = "" if base.endswith("/") else "/"
        return [base + separator + name]
    return WEIGHTS_URLS if name == WEIGHTS else [BASE_URL + name]


def check(path: Path, name: str) -> None:
    """Check that a file is the one that belongs under `name`.

    Raises:
        InputError: it is not.
    """
    if name == WEIGHTS:
        check_weights(path)
        return
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != SHA256[name]:
            raise InputError(f"{path}: its SHA-256 is not the original's")


def check_weights(path: Path) -> None:
    """Check that a checkpoint has the shape of `stories42M.pt`, then that it is whole.

    In this order, because a shape could be too large for the second check.

    Raises:
        InputError: it does not.
    """
    expected = shape_of(LlamaConfig())
    saved = pt.read_checkpoint(path, mapped=True)
    try:
        shape = shape_of(LlamaConfig.from_model_args(saved["model_args"]))
    except (KeyError, TypeError, ValueError):
        shape = expected  # `pt.load` says what is wrong
    if shape != expected:
        raise InputError(f"{path}: a Llama of another shape than {WEIGHTS}")
    pt.load(path)


def shape_of(config: LlamaConfig) -> tuple[int, ...]:
    """The numbers that the sizes of the tensors depend on."""
    return (config.dim, config.n_layers, config.n_heads, config.vocab_size, config.ffn_dim)


def open_url(url: str) -> http.client.HTTPResponse:
    """Open a URL in a thread, which can be abandoned if the server never completes its headers.

    Raises:
        TimeoutError: the headers take too long.
        OSError, http.client.HTTPException, ValueError: the URL cannot be opened.
    """
    answers: queue.Queue[http.client.HTTPResponse | Exception] = queue.Queue()

    def open_in_thread() -> None:
        try:
            answers.put(urllib.request.urlopen(url, timeout=TIMEOUT))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=open_in_thread, daemon=True).start()
    try:
        answer = answers.get(timeout=1.5 * TIMEOUT)  # the socket's own timeout says more
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def open_source(source: str) -> io.BufferedIOBase:
    """Open a file or a URL for reading."""
    if "://" in source:
        return open_url(source)
    if Path(source).exists() and not Path(source).is_file():
        raise InputError("not a file")
    return open(source, "rb")


def copy_to(source: str, target: Path, limit: int) -> None:
    """Copy a file or download a URL, with a progress bar.

    Args:
        target: must not exist.
        limit: largest number of bytes.

    Raises:
        InputError: the source is larger, or not a file.
        TimeoutError: it is too slow.
        OSError, http.client.HTTPException, ValueError: it cannot be read.
    """
    start, n_bytes = time.monotonic(), 0
    with open_source(source) as stream, target.open("xb") as file:
        size = getattr(stream, "length", None)  # of a URL, if the server says it
        with tqdm(
            desc=target.name, total=size, unit="B", unit_scale=True, leave=False, disable=None
        ) as bar:
            while block := stream.read1(BLOCK):
                file.write(block)
                bar.update(len(block))
                n_bytes += len(block)
                if n_bytes > limit:
                    raise InputError(f"more than {limit:,} bytes")
                seconds = time.monotonic() - start
                if seconds > TIMEOUT and n_bytes < seconds * MIN_SPEED:
                    raise TimeoutError("too slow")


def partial_of(name: str) -> Path:
    """Where a file is until it has been checked."""
    return Path(name).with_name(f".{Path(name).name}.part")


def fetch(name: str, unreachable: dict[str, str]) -> str | None:
    """Fetch a file from the first source that has it.

    Args:
        unreachable: hosts that did not answer, with the reason; they are not tried again.

    Returns:
        the reasons why no source could provide it, or None.
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
    """Fetch a file from one source to `partial`, and check it. Returns why that failed, or None."""
    host = ""
    try:
        host = urllib.parse.urlsplit(source).netloc
        if host in unreachable:
            return unreachable[host]
        copy_to(source, partial, MAX_WEIGHTS if name == WEIGHTS else MAX_FILE)
        check(partial, name)
        return None
    except InputError as error:
        return f"wrong file at {source}: {str(error).removeprefix(f'{partial}: ')}"
    except urllib.error.HTTPError as error:
        if 300 <= error.code < 400:
            return f"{host} redirects in circles"
        return f"{host} says {error.code} {str(error.reason)[:40]}"
    except (OSError, http.client.HTTPException, ValueError) as error:
        if not host:
            return getattr(error, "strerror", None) or str(error)
        is_slow = str(error) == "too slow"
        unreachable[host] = f"{host} is too slow" if is_slow else f"no answer from {host}"
        return unreachable[host]


def is_wanted(name: str) -> bool:
    """Whether to fetch a file: if it is absent, or a broken copy of the weights."""
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


def fetch_all() -> None:
    """Fetch what is wanted, and report what could not be fetched in one line."""
    unreachable: dict[str, str] = {}
    missing: dict[str, list[str]] = {}  # by reason
    for name in [*SHA256, WEIGHTS]:
        partial_of(name).unlink(missing_ok=True)  # of a run that was killed
        if is_wanted(name) and (reason := fetch(name, unreachable)):
            missing.setdefault(reason, []).append(name)
    if missing:
        names = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in missing.items())
        print(
            f"missing: {names}; the three checks, the tests, and run_llama.py with the small model "
            "of data/demo work all the same; running setup.sh again tries again",
            file=sys.stderr,
        )


def main() -> None:
    description = "Fetch the assignment's files, from MINLLAMA_ASSETS if it is set."
    ArgumentParser(description=description).parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # removes partial files
    fetch_all()


if __name__ == "__main__":
    run_script(main)
