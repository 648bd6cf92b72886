"""Settings: types, ranges, flags."""

import dataclasses
import math
import re
from pathlib import Path

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
    shares: tuple[float, float] = flag((0.5, 0.5), "of two, in %", high=1, nargs=2)
    is_on: bool = flag(False, "or off")
    file: str | None = None
    names: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("size", 0, "--size 0: out of range, expected 1 to 9"),
        ("size", "3", "--size 3: expected int, not str"),
        ("size", 3.0, "--size 3.0: expected int, not float"),
        ("size", True, "--size True: expected int, not bool"),
        ("size", None, "--size None: expected int, not None"),
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
def test_a_wrong_type_or_range_is_refused_by_the_flags_name(name, value, message):
    with pytest.raises(InputError, match=re.escape(message)):
        Example(**{name: value})


def test_values_are_converted_where_nothing_is_lost():
    settings = Example(
        size=np.int64(4), rate=2, kind="b", shares=[1, 0], file=Path("a"), names=["x"]
    )
    assert settings == Example(
        size=4, rate=2.0, kind="b", shares=(1.0, 0.0), file="a", names=("x",)
    )
    assert type(settings.size) is int and type(settings.rate) is float
    assert settings.changed() == {"size": 4, "rate": 2.0, "kind": "b", "shares": (1.0, 0.0)}
    saved = settings.to_dict()
    assert saved["shares"] == [1.0, 0.0] and saved["names"] == ["x"]
    assert Example(**saved) == settings
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.size = 5


def test_flags_come_from_the_fields():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Other(Settings):
        title = "another"
        size: int = flag(7, "how large")

    parser = ArgumentParser(prog="p")
    add_flags(parser, [Example, Other])
    assert vars(parser.parse_args([])) == {}  # flags that are not given stay absent
    args = parser.parse_args(["--size", "5", "--the-kind", "b", "--shares", "0", "1", "--is_on"])
    assert Example(**vars(args)) == Example(size=5, kind="b", shares=(0.0, 1.0), is_on=True)
    help = " ".join(parser.format_help().split())
    assert "an example:" in help and "--names" not in help
    assert "--size N how large (default: 3; another 7)" in help
    assert "--shares X X of two, in % (default: 0.5 0.5)" in help
    assert "--the-kind {a,b}" in help
    for arguments in (["--size", "x"], ["--size"], ["--absent"]):
        with pytest.raises(InputError, match="--help"):
            parser.parse_args(arguments)
