"""Lines of text from files and pipes, whatever ends them."""

import codecs
import io
from collections.abc import Iterator
from pathlib import Path

from minllama.common.errors import InputError, missing_file


def read_lines(source: io.RawIOBase, name: str | Path) -> Iterator[list[str]]:
    """Yield, after each read of an unbuffered file, the lines that are complete.

    They end in `\\n`, `\\r\\n` or `\\r`. A byte-order mark is left out.

    Raises:
        InputError: a line is not UTF-8 (the message has its number), or the file does not wait for
            data.
    """
    utf8 = codecs.getincrementaldecoder("utf-8-sig")()
    decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
    rest, n_lines, is_open = "", 0, True
    while is_open:
        data = source.read(1 << 16)  # returns what is there; waits only if nothing is
        if data is None:
            raise InputError(f"{name}: does not block; pass it through a pipe, as in `cat | …`")
        is_open = data != b""
        try:
            *lines, rest = (rest + decoder.decode(data, final=not is_open)).split("\n")
        except UnicodeDecodeError as error:
            number = n_lines + len((error.object[: error.start] + b"?").splitlines())
            raise InputError(f"{name}, line {number}: not UTF-8 text; save it as UTF-8") from error
        if rest and not is_open:
            lines.append(rest)
        n_lines += len(lines)
        if lines:
            yield lines


def lines_of(path: str | Path) -> list[str]:
    """Read all lines of a file.

    Raises what `read_lines` raises, and FileNotFoundError.
    """
    if not Path(path).is_file():
        raise missing_file(path)
    with open(path, "rb", buffering=0) as file:
        return [line for lines in read_lines(file, path) for line in lines]
