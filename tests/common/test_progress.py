"""Log lines every half minute, bars on a terminal, and the time left of a training run."""

import io
import sys

import pytest

from minllama.common.progress import Bar, Pace


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self, monkeypatch):
        self.now = 1000.0
        for name in ("time.perf_counter", "tqdm.std.time"):
            monkeypatch.setattr(name, lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_a_log_has_a_line_every_half_minute(monkeypatch, clock):
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    bar = Bar(total=100, desc="train", initial=10)
    pace = Pace(90, 3)
    for _ in range(60):
        clock.now += 1.5
        pace.record("step")
        bar.report(3.14159, pace.seconds_left)
        bar.update()
    for _ in Bar(range(5), desc="a short evaluation between"):
        clock.now += 1
    bar.close()
    assert log.getvalue().split("\n") == [
        "train: 30/100, 0.67it/s, loss 3.142, 01:45 left",
        "train: 50/100, 0.67it/s, loss 3.142, 01:15 left",
        "train: 70/100, 0.67it/s, loss 3.142, 00:45 left",
        "",
    ]


def test_a_log_line_of_an_iterable_has_the_time_left(monkeypatch, clock):
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    for _ in Bar(range(50), desc="read", unit="B", unit_scale=True):
        clock.now += 1
    assert log.getvalue() == "read: 30.0/50.0, 1.00B/s, 00:20 left\n"


def test_a_terminal_has_a_bar_that_disappears(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    bar = Bar(range(3), desc="train", mininterval=0)
    for _ in bar:
        bar.report(2.5, 61)
    pieces = terminal.getvalue().split("\r")
    assert any("loss 2.500, 01:01 left" in piece for piece in pieces)
    assert "\n" not in terminal.getvalue() and not pieces[-1]


def test_the_time_left_counts_steps_and_pauses(clock):
    pace = Pace(10, 2)
    for _ in range(5):
        clock.now += 2
        pace.record("step")
    assert pace.seconds_left == 10  # the length of a pause is unknown
    clock.now += 30
    pace.record("pause")
    assert pace.seconds_left == 10 + 30
