"""Settings: types, ranges, flags."""

import dataclasses
import math
import re

import numpy as np
import pytest

from minllama.common.errors import InputError
from minllama.common.program import ArgumentParser
from minllama.common.settings import Settings, add_flags, flag


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example(Settings):
    title = "an example"
    size: int = flag(3, "how large", low=1, high=9)
    rate: float | None = flag(None, "how fast")
    kind: str = flag("a", "which", choices=("a", "b"), spelling="--the-kind")
    shares: tuple[float, float] = flag((0.5, 0.5), "of two", high=1, nargs=2)
    is_on: bool = flag(False, "or off")
    given: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("size", 0, "--size 0: out of range, expected 1 to 9"),
        ("size", "3", "--size 3: expected int, not str"),
        ("size", 3.0, "--size 3.0: expected int, not float"),
        ("size", True, "--size True: expected int, not bool"),
        ("size", None, "--size None: expected int, not None"),
        ("size", np.ones(3), "expected int, not ndarray"),
        ("rate", math.nan, "--rate nan: out of range"),
        ("rate", math.inf, "--rate inf: out of range"),
        ("rate", "fast", "--rate fast: expected float or None, not str"),
        ("kind", "c", "--the-kind c: expected one of a, b"),
        ("shares", [0.5], "expected 2 values"),
        ("shares", [0.5, 2.0], "out of range, expected 0 to 1"),
        ("shares", [0.5, "x"], "expected float, not str"),
        ("is_on", 1, "--is_on 1: expected bool, not int"),
    ],
)
def test_settings_of_another_type_or_range_are_refused_by_name(name, value, complaint):
    with pytest.raises(InputError, match=re.escape(complaint)):
        Example(**{name: value})


def test_settings_take_what_is_near_enough():
    settings = Example(size=np.int64(4), rate=2, kind="b", shares=[1, 0], given=["size"])
    assert settings == Example(size=4, rate=2.0, kind="b", shares=(1.0, 0.0), given=("size",))
    assert type(settings.size) is int and type(settings.rate) is float
    assert settings.changed() == {"size": 4, "rate": 2.0, "kind": "b", "shares": (1.0, 0.0)}
    plain = {"size": 4, "rate": 2.0, "kind": "b", "shares": [1.0, 0.0], "is_on": False}
    assert settings.to_dict() == plain | {"given": ["size"]}
    assert Example(**plain) == settings.replace(given=())
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.size = 5


def test_flags_come_from_the_fields():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Other(Settings):
        title = "another"
        size: int = flag(7, "how large")

    parser = ArgumentParser(prog="p")
    add_flags(parser, [Example, Other])
    assert vars(parser.parse_args([])) == {}  # what is not given stays absent
    given = parser.parse_args(["--size", "5", "--the-kind", "b", "--shares", "0", "1", "--is_on"])
    assert Example.from_args(given) == Example(size=5, kind="b", shares=(0.0, 1.0), is_on=True)
    help = " ".join(parser.format_help().split())
    assert "an example:" in help
    assert "--size N how large (default: 3; another 7)" in help
    assert "--shares X X of two (default: 0.5 0.5)" in help
    assert "--the-kind {a,b}" in help and "--given" not in help
    with pytest.raises(InputError, match="--size: invalid int value: 'x'; --help lists"):
        parser.parse_args(["--size", "x"])
