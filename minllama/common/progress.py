"""Progress bars on a terminal, log lines elsewhere, and the time that is left."""

import sys
import time
from typing import Any

from tqdm import tqdm

INTERVAL = 30  # seconds between log lines
TERMINAL_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{rate_fmt}{postfix}]"
LOG_FORMAT = "{desc}: {n_fmt}/{total_fmt}, {rate_noinv_fmt}{postfix}"


class LogFile:
    """Standard error without the cursor movements of tqdm: whole lines only."""

    def write(self, text: str) -> None:
        line = " ".join(text.replace("\x1b[A", "").split())
        if line:
            print(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        pass


class Bar(tqdm):
    """A tqdm bar that disappears at its end; without a terminal, a log line every half minute."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.is_terminal = sys.stderr.isatty()
        if not self.is_terminal:
            kwargs |= {"file": LogFile(), "bar_format": f"{LOG_FORMAT}, {{remaining}} left"}
            kwargs |= {"smoothing": 0, "delay": INTERVAL, "mininterval": INTERVAL}
            kwargs |= {"maxinterval": INTERVAL}
        super().__init__(*args, leave=False, **kwargs)

    def report(self, loss: float | None, seconds_left: float) -> None:
        """Show a loss, and the time left of the whole run instead of this bar's."""
        self.bar_format = TERMINAL_FORMAT if self.is_terminal else LOG_FORMAT
        text = "" if loss is None else f"loss {loss:.3f}, "
        self.set_postfix_str(f"{text}{self.format_interval(seconds_left)} left", refresh=False)


class Pace:
    """Estimates how long a training run still takes.

    Args:
        n_steps, n_pauses: how many are left; a pause is an evaluation with saving.
    """

    def __init__(self, n_steps: int, n_pauses: int):
        self.n_left = {"step": n_steps, "pause": n_pauses}
        self.n_done = {"step": 0, "pause": 0}
        self.seconds = {"step": 0.0, "pause": 0.0}
        self._last = time.perf_counter()

    def record(self, event: str) -> None:
        """Record that a "step" or a "pause" has ended."""
        now = time.perf_counter()
        self.seconds[event] += now - self._last
        self.n_done[event] += 1
        self.n_left[event] = max(0, self.n_left[event] - 1)
        self._last = now

    @property
    def seconds_left(self) -> float:
        """The time for what is left, each step and pause at the mean of those before."""
        return sum(
            n_left * self.seconds[event] / max(1, self.n_done[event])
            for event, n_left in self.n_left.items()
        )
