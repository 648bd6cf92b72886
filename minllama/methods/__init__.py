"""Ways to fine-tune: one paper, one file, one line in `METHODS`."""

import hashlib
import re
from collections.abc import Sequence
from typing import Any

from minllama.methods.adapter import Adapters
from minllama.methods.base import Method
from minllama.methods.learning_rates import EarlyStopping, LearningRates
from minllama.methods.lora import LoRA
from minllama.methods.mixout import Mixout
from minllama.methods.partial import HeadOnly, NormsOnly
from minllama.methods.pooling import Pooling
from minllama.methods.prefix_tuning import PrefixTuning
from minllama.methods.prompt_based import FewShot, PromptBased
from minllama.methods.smart import Smart
from minllama.methods.wise_ft import WiseFT

METHODS: tuple[type[Method], ...] = (  # in the order in which their hooks are called
    PromptBased,
    FewShot,
    HeadOnly,
    LoRA,
    Adapters,
    PrefixTuning,
    NormsOnly,
    Pooling,
    WiseFT,
    Mixout,
    LearningRates,
    EarlyStopping,
    Smart,
)
TUNE_CHOICES = ("full", *(cls.tune for cls in METHODS if cls.tune is not None))


def active_methods(values: dict[str, Any]) -> tuple[Method, ...]:
    """The methods that flags turn on.

    Args:
        values: the values of flags by name; other flags are ignored.

    Raises:
        InputError: a value is wrong, or two methods cannot be combined.
    """
    every = [cls(**cls.select_fields(values)) for cls in METHODS]
    methods = tuple(method for method in every if method.is_on(values))
    for method in methods:
        method.check([other for other in methods if other is not method])
    return methods


def flag_values(methods: Sequence[Method]) -> dict[str, Any]:
    """The flags of all methods: those of `methods`, the others at their defaults."""
    values: dict[str, Any] = {}
    for cls in METHODS:
        if cls.tune is not None:
            values["tune"] = "full"
        values |= cls.defaults()
    for method in methods:
        values |= method.to_dict()
        if method.tune is not None:
            values["tune"] = method.tune
    return values


def changed_values(methods: Sequence[Method]) -> dict[str, Any]:
    """The flags of methods that are not at their defaults."""
    defaults = flag_values(())
    return {name: x for name, x in flag_values(methods).items() if x != defaults[name]}


def file_suffix(methods: Sequence[Method]) -> str:
    """A file-name suffix that names the methods, such as "-tune-lora", or its digest."""
    values = changed_values(methods)
    parts = (name if value is True else f"{name}-{value}" for name, value in values.items())
    suffix = "".join(f"-{part}" for part in parts)
    if len(suffix) > 100 or not re.fullmatch(r"[\w.-]*", suffix):
        return f"-methods-{hashlib.sha256(suffix.encode()).hexdigest()[:8]}"
    return suffix
