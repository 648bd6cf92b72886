"""Progress bars on a terminal, log lines elsewhere."""

import io
import sys
from typing import Any

from tqdm import tqdm

INTERVAL = 30  # seconds between log lines
LOG_LINE = "{desc}: {n_fmt}/{total_fmt}, {rate_noinv_fmt}{postfix}, {remaining} left"


class LogLines(io.TextIOBase):
    """Standard error without the carriage returns and padding of tqdm."""

    def write(self, text: str) -> int:
        if line := " ".join(text.split()):
            print(line, file=sys.stderr)
        return len(text)


def progress_bar(*args: Any, **kwargs: Any) -> tqdm:
    """A tqdm bar that disappears at its end; without a terminal, a log line every half minute."""
    if not sys.stderr.isatty():
        kwargs |= {"file": LogLines(), "bar_format": LOG_LINE, "position": 0, "smoothing": 0}
        kwargs |= dict.fromkeys(("delay", "mininterval", "maxinterval"), INTERVAL)
    return tqdm(*args, leave=False, **kwargs)
