"""Typed settings: frozen dataclasses whose fields are flags, defaults, checks and saved values."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from minllama.common.errors import InputError

METAVARS: dict[Any, str] = {int: "N", float: "X", str: "FILE"}


def flag(
    default: Any,
    help: str,
    *,
    low: float = 0,
    high: float = 2**31 - 1,
    spelling: str | None = None,
    choices: Sequence[str] | Callable[[], Sequence[str]] | None = None,
    **options: Any,
) -> Any:
    """A field of `Settings` that is a flag of the command line.

    Args:
        low, high: the range of a number.
        spelling: the flag, if it is not two dashes and the field's name.
        choices: the texts that are allowed, or a function that returns them.
        options: `metavar` and `nargs` of argparse. A text that is no path has the metavar "TEXT".
    """
    limits = {"low": low, "high": high, "choices": choices}
    metadata = {"help": help, "spelling": spelling, "options": options, **limits}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of all settings. A field is a flag, its default, its check, and its entry when saved.

    Subclasses are frozen dataclasses. `flag` makes the fields that the command line sets.
    Annotations are `bool`, `int`, `float`, `str`, a `list` or `tuple` of these, or one of them
    `| None`. An integer is accepted as a float, a path as a text, a NumPy number as a number.

    Attributes:
        title, description: heading and text of the group of flags in `--help`.

    Raises:
        InputError: a value has another type or is out of range; the message names the flag.
    """

    title: ClassVar[str] = ""
    description: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        annotations = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            try:
                value = validate(value, annotations[field.name], field.metadata)
            except ValueError as error:
                shown = "''" if value == "" else value
                raise InputError(f"{spelling_of(field)} {shown}: {error}") from None
            object.__setattr__(self, field.name, value)  # as frozen dataclasses do themselves

    @classmethod
    def select_fields(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Select the values whose names are fields."""
        names = {field.name for field in dataclasses.fields(cls)}
        return {name: value for name, value in values.items() if name in names}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The flags with their defaults."""
        return {field.name: field.default for field in dataclasses.fields(cls) if field.metadata}

    def to_dict(self) -> dict[str, Any]:
        """All fields as values that JSON and a checkpoint can hold."""
        return {
            field.name: to_plain(getattr(self, field.name)) for field in dataclasses.fields(self)
        }

    def changed(self) -> dict[str, Any]:
        """The flags that are not at their defaults, with their values."""
        defaults = self.defaults()
        values = {name: getattr(self, name) for name in defaults}
        return {name: value for name, value in values.items() if value != defaults[name]}

    def replace(self, **changes: Any) -> Self:
        """A copy with some changes."""
        return dataclasses.replace(self, **changes)


def values_of(args: Any, names: Iterable[str]) -> dict[str, Any]:
    """Take the values with some names from a mapping, or from the attributes of any object.

    None means that a value is not given.

    Raises:
        InputError: none of them is there.
    """
    get = args.get if isinstance(args, Mapping) else functools.partial(getattr, args)
    values = {name: get(name, None) for name in names}
    values = {name: value for name, value in values.items() if value is not None}
    if not values:
        raise InputError(f"{type(args).__name__}: has none of the settings, such as batch_size")
    return values


def spelling_of(field: dataclasses.Field) -> str:
    """A field's flag as the user writes it."""
    return field.metadata.get("spelling") or f"--{field.name}"


def union_members(annotation: Any) -> tuple[Any, ...]:
    """The types that an annotation allows: `int | None` allows int and NoneType."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def validate(value: Any, annotation: Any, limits: Mapping[str, Any]) -> Any:
    """Convert a value to its annotation, if nothing is lost, and check its range.

    Args:
        limits: the metadata of `flag`; empty for no range.

    Raises:
        ValueError: the type or the range is wrong.
    """
    kinds = union_members(annotation)
    value = as_python_number(value)
    if isinstance(value, Path) and str in kinds:
        value = str(value)
    if type(value) is int and float in kinds:
        value = float(value)
    for kind in kinds:
        container, items = typing.get_origin(kind), typing.get_args(kind)
        if container in (list, tuple) and isinstance(value, list | tuple):
            if container is tuple and Ellipsis not in items and len(value) != len(items):
                raise ValueError(f"expected {len(items)} values")
            return container(validate(item, items[0], limits) for item in value)
        is_bool_as_int = isinstance(value, bool) and kind is not bool
        if container is None and isinstance(value, kind) and not is_bool_as_int:
            check_range(value, limits)
            return value
    names = " or ".join("None" if kind is types.NoneType else kind.__name__ for kind in kinds)
    raise ValueError(f"expected {names}, not {type(value).__name__}".replace("NoneType", "None"))


def check_range(value: Any, limits: Mapping[str, Any]) -> None:
    """Check a value against the choices and the range of its flag, or raise ValueError."""
    choices = choices_of(limits) if limits else None
    if choices and value is not None and value not in choices:
        raise ValueError(f"expected one of {', '.join(choices)}")
    if limits and type(value) in (int, float) and not limits["low"] <= value <= limits["high"]:
        raise ValueError(f"out of range, expected {limits['low']} to {limits['high']}")
    # An empty path comes from an unset variable of a shell, and would stand for the default.
    if limits and value == "" and limits["options"].get("metavar") != "TEXT":
        raise ValueError("expected the name of a file or folder")


def choices_of(metadata: Mapping[str, Any]) -> Sequence[str] | None:
    """The choices of a flag."""
    choices = metadata["choices"]
    return choices() if callable(choices) else choices


def as_python_number(value: Any) -> Any:
    """Convert a number of NumPy or PyTorch; return anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def to_plain(value: Any) -> Any:
    """Convert a value so that it is saved without pickling a class; others become their text."""
    value = as_python_number(value)
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value if type(value) in (bool, int, float, str, types.NoneType) else str(value)


def add_flags(parser: argparse.ArgumentParser, classes: Sequence[type[Settings]]) -> None:
    """Declare the flags of settings, a group for each class. A flag that is not given is absent.

    A flag of several classes is in the group of the first; its help has the defaults of all.
    """
    declared: set[str] = set()
    for cls in classes:
        group = parser.add_argument_group(cls.title, vars(cls).get("description"))
        annotations = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if field.metadata and field.name not in declared:
                declared.add(field.name)
                options = argparse_options(field, annotations[field.name])
                options["help"] += default_text(field, classes).replace("%", "%%")
                group.add_argument(spelling_of(field), **options)


def argparse_options(field: dataclasses.Field, annotation: Any) -> dict[str, Any]:
    """The arguments of `add_argument` for a flag."""
    help = field.metadata["help"].replace("%", "%%")
    options = {"dest": field.name, "default": argparse.SUPPRESS, "help": help}
    kind = next(kind for kind in union_members(annotation) if kind is not types.NoneType)
    if annotation is bool:
        return options | {"action": "store_true"}
    if kind is bool:
        return options | {"action": argparse.BooleanOptionalAction}
    item_type = (typing.get_args(kind) or (kind,))[0]
    choices = choices_of(field.metadata)
    if choices is None:
        options["metavar"] = METAVARS[item_type]
    return options | {"type": item_type, "choices": choices} | field.metadata["options"]


def default_text(field: dataclasses.Field, classes: Sequence[type[Settings]]) -> str:
    """The default of a flag for `--help`, and those of classes that have another one."""
    if field.default is None or field.default is False or "default" in field.metadata["help"]:
        return ""
    texts = [format_default(field.default)]
    for cls in classes:
        default = cls.defaults().get(field.name, field.default)
        if default != field.default:
            texts.append(f"{cls.title} {format_default(default)}")
    return f" (default: {'; '.join(texts)})"


def format_default(value: Any) -> str:
    """A default as the user writes it."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
