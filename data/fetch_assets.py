"""Fetch the assignment's weights, tokenizer, check data and data sets; `setup.sh` runs this.

    .venv/bin/python -m data.fetch_assets

They come from their original addresses, or from `MINLLAMA_ASSETS`, a folder or a base URL with the
same files under the same names. A file takes its name only after it was checked. Existing files are
left alone, except a broken `stories42M.pt`.
"""

import hashlib
import http.client
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

from config import LlamaConfig
from minllama.checkpoints import pt
from minllama.common.errors import InputError
from minllama.common.files import atomic_write, remove_leftovers
from minllama.common.program import ArgumentParser, run_script
from minllama.common.progress import progress_bar

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
TIMEOUT = 20  # seconds without an answer after which an address is given up


def fetch_all() -> None:
    """Fetch the files that are absent, and report the missing ones in one line."""
    unreachable: dict[str, str] = {}
    missing: dict[str, list[str]] = {}  # by reason
    for name in [*SHA256, WEIGHTS]:
        remove_leftovers(name)
        if is_wanted(name) and (reason := fetch(name, unreachable)):
            missing.setdefault(reason, []).append(name)
    if missing:
        names = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in missing.items())
        print(
            f"missing: {names}; the three checks, the tests, and run_llama.py with the small model "
            "of data/demo work all the same; running setup.sh again tries again",
            file=sys.stderr,
        )


def is_wanted(name: str) -> bool:
    """Whether to fetch a file: if it is absent, or a broken copy of the weights."""
    if not Path(name).exists():
        return True
    try:
        check(Path(name), name)
        return False
    except (InputError, OSError):
        fate = "broken and is fetched again"
        if name != WEIGHTS:
            fate = "not the original and is left as it is; delete it to fetch that"
        print(f"{name} is {fate}", file=sys.stderr)
        return name == WEIGHTS


def check(path: Path, name: str) -> None:
    """Check that a file is the one that belongs under `name`.

    Raises:
        InputError: it is not the original, or for the weights, not whole or of another shape.
    """
    if name == WEIGHTS:
        config = pt.load(path).config
        for size in ("dim", "n_layers", "n_heads", "vocab_size", "ffn_dim"):
            if getattr(config, size) != getattr(LlamaConfig(), size):
                raise InputError(f"{path}: a Llama of another shape than {WEIGHTS}")
    elif hashlib.sha256(path.read_bytes()).hexdigest() != SHA256[name]:
        raise InputError(f"{path}: its SHA-256 is not the original's")


def fetch(name: str, unreachable: dict[str, str]) -> str | None:
    """Fetch a file from the first address that has it.

    Args:
        unreachable: hosts that did not answer, with the reason; they are not tried again.

    Returns:
        the reasons why no address could provide it, or None.
    """
    reasons = []
    for url in urls_of(name):
        host = url.split("/")[2]  # "" for a file
        try:
            if host not in unreachable:
                download(url, name)
                return None
            reasons.append(unreachable[host])
        except InputError as error:
            reasons.append(str(error))
        except urllib.error.HTTPError as error:
            reasons.append(f"{host} says {error.code}")
        except (OSError, http.client.HTTPException, ValueError) as error:
            cause = getattr(error, "reason", error)  # of a URLError
            reasons.append(getattr(cause, "strerror", None) or str(cause))
            if host:
                unreachable[host] = reasons[-1] = f"{host}: {reasons[-1]}"
    return ", ".join(reasons)


def urls_of(name: str) -> list[str]:
    """The addresses of a file, the best first."""
    base = os.environ.get("MINLLAMA_ASSETS")
    if not base:
        return WEIGHTS_URLS if name == WEIGHTS else [BASE_URL + name]
    if "://" not in base:
        base = Path(base).absolute().as_uri()
    return [f"{base.rstrip('/')}/{name}"]


def download(url: str, name: str) -> None:
    """Download a file; it takes its name after it was checked.

    Raises:
        InputError: it is not the file that belongs under `name`.
        OSError, http.client.HTTPException: it cannot be read or written.
    """
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    with urllib.request.urlopen(url, timeout=TIMEOUT) as answer, atomic_write(name, "wb") as file:
        size = answer.headers.get("Content-Length")
        with progress_bar(total=size and int(size), desc=name, unit="B", unit_scale=True) as bar:
            while block := answer.read(1 << 20):
                file.write(block)
                bar.update(len(block))
        file.flush()
        try:
            check(Path(file.name), name)
        except InputError as error:
            raise InputError(f"wrong file at {str(error).replace(file.name, url)}") from None


def main() -> None:
    description = "Fetch the assignment's files, from MINLLAMA_ASSETS if it is set."
    ArgumentParser(description=description).parse_args()
    fetch_all()


if __name__ == "__main__":
    run_script(main)
