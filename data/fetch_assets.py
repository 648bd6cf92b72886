"""Fetch the assignment's weights, tokenizer, check data and data sets; `setup.sh` runs this.

    .venv/bin/python -m data.fetch_assets

They come from their original addresses, or from `MINLLAMA_ASSETS`, a folder or a base URL that
has the same files under the same names. A file takes its name only after it was checked. What is
there already is left alone, unless it is a broken `stories42M.pt`.
"""

import hashlib
import http.client
import os
import shutil
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from tqdm import tqdm

from llama import load_pretrained
from utils import InputError, run_script

WEIGHTS = "stories42M.pt"
WEIGHTS_URLS = [
    "https://www.cs.cmu.edu/~vijayv/stories42M.pt",
    "https://huggingface.co/karpathy/tinyllamas/resolve/main/stories42M.pt",
]
BASE_URL = "https://raw.githubusercontent.com/neubig/minllama-assignment/master/"
SHA256 = {
    "tokenizer.model": "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347",
    "sanity_check.data": "34f7c763a3bb025940029bd970594e985bf69b7ed6e693a8f5cccbef0cee55b0",
    "data/sst-train.txt": "7aeac81f2a387f2ce7fab98ed8f40ef85cc9c8ad11bcbb63b122e95665cb1f35",
    "data/sst-dev.txt": "11963c76cd073e68006da0390620aadf5a4b8f775e2f900e92a50b3002e39b9b",
    "data/sst-test.txt": "bdcc8352d37bdc82113e4a4dd887b824144201539d5a1e49be566232d306a4ba",
    "data/sst-label-mapping.json": (
        "831e6914e25d9b9eb56ff9095b3f035bdaf1b9568d385a70ef481c82af0382b3"
    ),
    "data/cfimdb-train.txt": "278e200499d1d68a1a9d80e3947a2203cc97130632d8a53f2b9c11de9cb6c699",
    "data/cfimdb-dev.txt": "b38f0c095c4624e85927116728140e96d0221969b34146f65eae5b5bb24752b8",
    "data/cfimdb-test.txt": "8ad2f6da7bfb0e8fc36cf89eda47c574cc9c35d6347e665f31bc904d9ecfe0a7",
    "data/cfimdb-label-mapping.json": (
        "afeac43f5a5fe8758469078418519df4c8503c2e30e2fcf6c61464fce3d44a36"
    ),
}
TIMEOUT = 20  # seconds without an answer


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
        config = load_pretrained(path, init_weights=False).config
        shape = (config.dim, config.n_layers, config.n_heads, config.vocab_size)
        if shape != (512, 8, 8, 32000):
            raise InputError(f"{path}: a Llama of another shape than {WEIGHTS}")
    else:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != SHA256[name]:
                raise InputError(f"{path}: its SHA-256 is not the original's")


def copy_to(source: str, target: Path) -> None:
    """Copy a file or download a URL, with a progress bar for what takes long."""
    if "://" not in source:
        shutil.copyfile(source, target)
        return
    with urllib.request.urlopen(source, timeout=TIMEOUT) as response, target.open("wb") as file:
        size = int(response.headers.get("Content-Length", 0)) or None
        with tqdm(
            desc=target.name, total=size, unit="B", unit_scale=True, leave=False, disable=None
        ) as progress:
            while block := response.read(1 << 20):
                file.write(block)
                progress.update(len(block))


def fetch(name: str, unreachable: set[str]) -> str | None:
    """Fetch one file.

    Args:
        unreachable: hosts that did not answer before; they are not tried again.

    Returns:
        None, or why it could not be had.
    """
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    reasons = []
    for source in sources(name):
        host = ""
        try:
            host = urllib.parse.urlsplit(source).netloc
            if host not in unreachable:
                copy_to(source, partial)
                check(partial, name)
                partial.replace(path)
                return None
        except InputError as error:
            reasons.append(f"wrong file at {source}: {str(error).removeprefix(f'{partial}: ')}")
            continue
        except urllib.error.HTTPError as error:
            reasons.append(f"{host} says {error.code} {error.reason}")
            continue
        except (OSError, http.client.HTTPException, ValueError) as error:
            if not host:
                reasons.append(getattr(error, "strerror", None) or str(error))
                continue
            unreachable.add(host)
        finally:
            partial.unlink(missing_ok=True)
        reasons.append(f"no answer from {host}")
    return ", ".join(reasons)


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
    unreachable: set[str] = set()
    missing: dict[str, list[str]] = {}  # by reason
    for name in [*SHA256, WEIGHTS]:
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


if __name__ == "__main__":
    run_script(main)
