"""Files of metrics: a JSON object on each line."""

import json
import os
import warnings
from pathlib import Path
from typing import Any

from minllama.common.errors import InputError, missing_file
from minllama.common.files import name_file_in_errors

Records = list[dict[str, Any]]


def append_metrics(path: str | Path | None, **record: Any) -> None:
    """Append a line to a file, unless `path` is None. If that fails, warn and go on."""
    if path is None:
        return
    try:
        with name_file_in_errors(path), Path(path).open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(record)}\n")
    except OSError as error:
        warnings.warn(f"{path}: {error.strerror}; a line of metrics is lost", stacklevel=2)


def check_metrics_file(path: str | Path | None) -> None:
    """Check, before any work, that metrics can be appended to a file, unless `path` is None.

    Raises:
        InputError: the file is read-only, or holds something else.
    """
    if path is None or not Path(path).is_file():
        return
    if not os.access(path, os.W_OK):
        raise InputError(f"{path}: not writable")
    lines = Path(path).read_bytes().splitlines(keepends=True)
    if lines and not (lines[-1].endswith(b"\n") and parse_line(lines[-1]) is not None):
        raise InputError(f"{path}: not a file of JSON lines to add to; name another one")


def read_metrics(path: str | Path) -> Records:
    """Read the lines of a file; of several fine-tuning runs in it, only the last one's.

    Raises:
        FileNotFoundError: the file does not exist.
        InputError: a line is no JSON object.
    """
    if not Path(path).is_file():
        raise missing_file(path)
    records: Records = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        record = parse_line(line)
        if record is None:
            raise InputError(f"{path}, line {number}: no line of metrics")
        if record.get("epoch") == 0:
            records = []
        records.append(record)
    return records


def parse_line(line: bytes) -> dict[str, Any] | None:
    """Parse a line; None if it is no JSON object."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
