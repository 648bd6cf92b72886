"""Progress: a bar on a terminal, elsewhere a plain line every half minute. And the time left."""

import sys
import time
from typing import Any

from tqdm import tqdm

INTERVAL = 30  # seconds between plain lines


class Bar(tqdm):
    """A bar of tqdm's that leaves nothing behind; where standard error is no terminal, lines.

    What takes less than half a minute has no line.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        file = kwargs.setdefault("file", sys.stderr)
        self.is_plain = not file.isatty()
        self._last_line = time.monotonic()
        if self.is_plain:
            kwargs |= {"mininterval": 1, "maxinterval": INTERVAL}
        super().__init__(*args, leave=False, **kwargs)

    def report(self, loss: float | None, seconds_left: float) -> None:
        """Show a loss, and the time left of the whole run in place of this bar's."""
        self.bar_format = (
            "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{rate_fmt}{postfix}]"
        )
        shown = "" if loss is None else f"loss {loss:.3f}, "
        self.set_postfix_str(f"{shown}{self.format_interval(seconds_left)} left", refresh=False)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool | None:
        """Draw the bar, or write a line if it is time."""
        if not self.is_plain:
            return super().display(msg, pos)
        now = time.monotonic()
        if now - self._last_line >= INTERVAL:
            self._last_line = now
            print(self._line(), file=self.fp, flush=True)
        return True

    def clear(self, *args: Any, **kwargs: Any) -> None:
        if not self.is_plain:
            super().clear(*args, **kwargs)

    def close(self) -> None:
        if self.is_plain and not self.disable:  # there is nothing to wipe out
            self.disable = True
            self._decr_instances(self)
        else:
            super().close()

    def _line(self) -> str:
        told = self.format_dict
        scaled = self.format_sizeof if told["unit_scale"] else "{:,}".format
        total = "" if told["total"] is None else f"/{scaled(told['total'])}"
        parts = [f"{told['prefix'] or 'done'}: {scaled(told['n'])}{total}"]
        rate = (told["n"] - told["initial"]) / told["elapsed"] if told["elapsed"] else 0
        parts.append(
            f"{scaled(rate) if told['unit_scale'] else f'{rate:.2f}'} {told['unit'].strip()}/s"
        )
        if told["postfix"]:
            parts.append(told["postfix"])
        elif told["total"] and rate:
            parts.append(f"{self.format_interval((told['total'] - told['n']) / rate)} left")
        return ", ".join(parts)


class Pace:
    """How long a training still takes: its steps, and what comes between them.

    Args:
        n_steps, n_pauses: how many there are still; a pause is an evaluation, and saving.
    """

    def __init__(self, n_steps: int, n_pauses: int):
        self.left = {"step": n_steps, "pause": n_pauses}
        self.seconds = {"step": 0.0, "pause": 0.0}
        self.n_done = {"step": 0, "pause": 0}
        self._last = time.perf_counter()

    def record(self, what: str) -> None:
        """Since the last call there was a "step" or a "pause"."""
        now = time.perf_counter()
        self.seconds[what] += now - self._last
        self.n_done[what] += 1
        self.left[what] -= 1
        self._last = now

    @property
    def seconds_left(self) -> float:
        """A step and a pause that are left take what the average one took; 0 if there was none."""
        return sum(
            max(0, self.left[what]) * self.seconds[what] / max(1, self.n_done[what])
            for what in self.left
        )
