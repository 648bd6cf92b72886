"""What a log sees of a training: a plain line now and then, and one estimate of the time left."""

import io
import sys

import pytest

import minllama.common.progress
from minllama.common.progress import Bar, Pace


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self, monkeypatch):
        self.now = 1000.0
        for name in ("time.monotonic", "time.perf_counter", "tqdm.std.time"):
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
    bar.close()
    assert log.getvalue().splitlines() == [
        "train: 30/100, 0.67 it/s, loss 3.142, 01:45 left",
        "train: 50/100, 0.67 it/s, loss 3.142, 01:15 left",
        "train: 70/100, 0.67 it/s, loss 3.142, 00:45 left",
    ]


def test_what_is_quick_has_no_line(monkeypatch):
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    assert list(Bar(range(5), desc="eval")) == list(range(5))
    assert log.getvalue() == ""


def test_a_terminal_has_a_bar_that_goes_away(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    bar = Bar(range(3), desc="train", mininterval=0)
    for _ in bar:
        bar.report(2.5, 61)
    shown = terminal.getvalue().split("\r")
    assert any("loss 2.500, 01:01 left" in part for part in shown)
    assert "\n" not in terminal.getvalue() and not shown[-1]


def test_the_time_left_counts_steps_and_pauses(clock):
    pace = Pace(10, 2)
    for _ in range(5):
        clock.now += 2
        pace.record("step")
    assert pace.seconds_left == 10  # nothing is known of pauses
    clock.now += 30
    pace.record("pause")
    assert pace.seconds_left == 10 + 30
    assert minllama.common.progress.INTERVAL == 30
