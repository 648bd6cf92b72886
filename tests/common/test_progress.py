"""Log lines every half minute, and bars on a terminal."""

import io
import sys

from minllama.common.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_has_a_line_every_half_minute(monkeypatch):
    now = 1000.0
    monkeypatch.setattr("tqdm.std.time", lambda: now)
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    bar = progress_bar(total=100, desc="train", initial=10)
    for _ in range(60):
        now += 1.5
        bar.set_postfix(loss="3.142", refresh=False)
        bar.update()
        for _ in progress_bar(range(4), desc="a short evaluation between"):
            now += 0.125
    bar.close()
    assert log.getvalue().split("\n") == [
        "train: 26/100, 0.51it/s, loss=3.142, 02:25 left",
        "train: 42/100, 0.50it/s, loss=3.142, 01:55 left",
        "train: 57/100, 0.50it/s, loss=3.142, 01:25 left",
        "",
    ]


def test_a_terminal_has_a_bar_that_disappears(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    bar = progress_bar(range(3), desc="train", mininterval=0)
    for _ in bar:
        bar.set_postfix(loss="2.500", refresh=False)
    pieces = terminal.getvalue().split("\r")
    assert any("loss=2.500" in piece for piece in pieces)
    assert "\n" not in terminal.getvalue() and not pieces[-1]
