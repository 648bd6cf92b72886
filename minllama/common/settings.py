"""Typed settings: frozen dataclasses whose fields are flags, defaults, checks and what is saved."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, Self

from minllama.common.errors import InputError


def flag(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] | Callable[[], tuple[str, ...]] | None = None,
    metavar: str | None = None,
    nargs: str | int | None = None,
    spelling: str | None = None,
) -> Any:
    """A field of `Settings` that is a flag of the command line.

    Args:
        default: its value where the flag is not given.
        low, high: the range of a number; by default from 0 to 2³¹ - 1.
        choices: the only texts that are taken, or a function that tells them.
        metavar, nargs: as in argparse.
        spelling: the flag, if it is not the field's name behind two dashes.
    """
    metadata = {
        "help": help,
        "low": 0 if low is None else low,
        "high": 2**31 - 1 if high is None else high,
        "choices": choices,
        "metavar": metavar,
        "nargs": nargs,
        "spelling": spelling,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of all settings. A field is a flag, its default, its check, and an entry when saved.

    Subclasses are frozen dataclasses. Their fields are made by `flag`, but for those that no flag
    sets. Annotations are `bool`, `int`, `float`, `str`, or a `list` or `tuple` of these, and each
    of them may be `| None`. A whole number is taken for a float, a path for a text, and a number of
    numpy's for a number.

    Attributes:
        title, description: of the group of flags in `--help`.

    Raises:
        InputError: a value is of another type or out of its range; the message names the flag.
    """

    title: ClassVar[str] = ""
    description: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        for field, annotation in fields_of(type(self)):
            value = converted(getattr(self, field.name), annotation)
            object.__setattr__(self, field.name, value)  # frozen from here on
            if complaint := validate(value, annotation, field.metadata):
                raise InputError(f"{spelling_of(field)} {value}: {complaint}")

    @classmethod
    def from_args(cls, args: Any) -> Self:
        """Take from a Namespace, or any object with attributes, what these settings know."""
        return cls(**cls.known(vars(args)))

    @classmethod
    def known(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Of some values those that are fields here."""
        names = {field.name for field in dataclasses.fields(cls)}
        return {name: value for name, value in values.items() if name in names}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The flags at their defaults."""
        return {field.name: field.default for field, _ in fields_of(cls) if field.metadata}

    def to_dict(self) -> dict[str, Any]:
        """All fields as values that JSON and a checkpoint can hold."""
        return {
            field.name: to_plain(getattr(self, field.name)) for field in dataclasses.fields(self)
        }

    def changed(self) -> dict[str, Any]:
        """The flags that are not at their defaults."""
        values = {name: getattr(self, name) for name in self.defaults()}
        return {name: value for name, value in values.items() if value != self.defaults()[name]}

    def replace(self, **changes: Any) -> Self:
        """The same settings but for some changes."""
        return dataclasses.replace(self, **changes)


def fields_of(cls: type[Settings]) -> list[tuple[dataclasses.Field, Any]]:
    """The fields of settings, each with its annotation as a type."""
    annotations = typing.get_type_hints(cls)
    return [(field, annotations[field.name]) for field in dataclasses.fields(cls)]


def spelling_of(field: dataclasses.Field) -> str:
    """A field's flag as the user writes it."""
    return field.metadata.get("spelling") or f"--{field.name}"


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The types that an annotation allows: `int | None` to int and NoneType."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def converted(value: Any, annotation: Any) -> Any:
    """A value as its annotation has it, where it is near enough."""
    kinds = alternatives(annotation)
    if hasattr(value, "dtype") and getattr(value, "ndim", None) == 0:  # a number of numpy's
        value = value.item()
    if isinstance(value, Path) and str in kinds:
        return str(value)
    if type(value) is int and float in kinds:
        return float(value)
    for kind in kinds:
        container, items = typing.get_origin(kind), typing.get_args(kind)
        if container in (list, tuple) and isinstance(value, list | tuple):
            return container(converted(item, items[0]) for item in value)
    return value


def validate(value: Any, annotation: Any, metadata: typing.Mapping) -> str | None:
    """What is wrong with a setting's value, or None."""
    kinds = alternatives(annotation)
    if value is None and types.NoneType in kinds:
        return None
    for kind in kinds:
        container, items = typing.get_origin(kind), typing.get_args(kind)
        if container is not None and isinstance(value, container):
            is_fixed = container is tuple and Ellipsis not in items
            if is_fixed and len(value) != len(items):
                return f"expected {len(items)} values"
            complaints = (validate(item, items[0], metadata) for item in value)
            return next(filter(None, complaints), None)
        is_other_number = isinstance(value, bool) and kind is not bool
        if container is None and isinstance(value, kind) and not is_other_number:
            return out_of_range(value, metadata) if metadata else None
    names = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
    return f"expected {names}, not {type(value).__name__}".replace("NoneType", "None")


def out_of_range(value: Any, metadata: typing.Mapping) -> str | None:
    choices = choices_of(metadata)
    if choices and value not in choices:
        return f"expected one of {', '.join(choices)}"
    low, high = metadata["low"], metadata["high"]
    if type(value) in (int, float) and not low <= value <= high:
        return f"out of range, expected {low} to {high}"
    return None


def choices_of(metadata: typing.Mapping) -> tuple[str, ...] | None:
    choices = metadata["choices"]
    return choices() if callable(choices) else choices


def to_plain(value: Any) -> Any:
    """A value that can be saved without pickling a class; what is none becomes its text."""
    if hasattr(value, "dtype") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value if type(value) in (bool, int, float, str, types.NoneType) else str(value)


def add_flags(parser: argparse.ArgumentParser, classes: Iterable[type[Settings]]) -> None:
    """Declare the flags of settings, a group for each class; what is not given stays absent.

    A flag that several have is declared with the first of them. Its help tells the defaults of all.
    """
    classes = list(classes)
    told: dict[str, list[str]] = {}  # by flag its defaults, and where they are others
    values: dict[str, Any] = {}
    for cls in classes:
        for name, default in cls.defaults().items():
            text = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
            if name not in values and default is not None and default is not False:
                told[name] = [text]
            elif values.get(name, default) != default:
                told[name].append(f"{cls.title} {text}")
            values.setdefault(name, default)
    declared: set[str] = set()
    for cls in classes:
        group = parser.add_argument_group(cls.title, cls.description)
        for field, annotation in fields_of(cls):
            if field.metadata and field.name not in declared:
                declared.add(field.name)
                _add_flag(group, field, annotation, told.get(field.name, []))


def _add_flag(group: Any, field: dataclasses.Field, annotation: Any, told: list[str]) -> None:
    settings, help = field.metadata, field.metadata["help"]
    options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
    kind = next(kind for kind in alternatives(annotation) if kind is not types.NoneType)
    if told and "default" not in help:
        help += f" (default: {'; '.join(told)})"
    options["help"] = help.replace("%", "%%")
    if annotation is bool:
        options["action"] = "store_true"
    elif kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options["type"] = (typing.get_args(kind) or (kind,))[0]
        more = {"choices": choices_of(settings), "nargs": settings["nargs"]}
        if more["choices"] is None:
            usual = {int: "N", float: "X", str: "FILE"}
            more["metavar"] = settings["metavar"] or usual[options["type"]]
        options |= {name: value for name, value in more.items() if value is not None}
    group.add_argument(spelling_of(field), **options)
