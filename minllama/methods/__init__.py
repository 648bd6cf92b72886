"""Ways to fine-tune: one paper, one file, one line in `METHODS`."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from classifier import LlamaEmbeddingClassifier, SentenceClassifier
from minllama.common.settings import Settings, flag
from minllama.kernels.cpu import accelerate
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
from minllama.text.batches import Example
from minllama.text.labelled import fit_context
from tokenizer import Tokenizer, check_vocabulary

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


def tune_choices() -> tuple[str, ...]:
    """The values of `--tune`."""
    return ("full", *(cls.tune for cls in METHODS if cls.tune is not None))


@dataclass(frozen=True, kw_only=True)
class Tuning(Settings):
    """The flag that chooses among the methods with a `tune`."""

    title = "parameter-efficient fine-tuning (arXiv 2110.04366)"
    tune: str = flag(
        "full", "pretrained weights to train besides the new head", choices=tune_choices
    )


def flag_classes() -> list[type[Settings]]:
    """All classes with flags of methods, in the order of `--help`."""
    first_tuning = next(i for i, cls in enumerate(METHODS) if cls.tune is not None)
    return [*METHODS[:first_tuning], Tuning, *METHODS[first_tuning:]]


def active_methods(values: dict[str, Any]) -> tuple[Method, ...]:
    """The methods that flags turn on.

    Args:
        values: by flag; other flags are ignored.

    Raises:
        InputError: a value is wrong, or two methods cannot be combined.
    """
    Tuning(**Tuning.known(values))  # raises if --tune has no such value
    every = [cls(**cls.known(values)) for cls in METHODS]
    methods = tuple(method for method in every if method.is_on(values))
    for method in methods:
        method.check([other for other in methods if other is not method])
    return methods


def flag_values(methods: Sequence[Method]) -> dict[str, Any]:
    """The flags of all methods: those of `methods`, the others at their defaults."""
    values: dict[str, Any] = {}
    for cls in flag_classes():
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


def need_label_names(methods: Sequence[Method]) -> bool:
    """Whether a method needs the names of the labels."""
    return any("label names" in method.requires for method in methods)


def build_classifier(
    config: Any, methods: Sequence[Method], tokenizer: Tokenizer
) -> SentenceClassifier:
    """Build the classifier that the methods fine-tune.

    Args:
        config: as the classifiers of `classifier.py` take it, with `label_names`.

    Raises:
        InputError: the tokenizer is another model's.
    """
    built = [method.build(config, tokenizer) for method in methods]
    model = next((model for model in built if model is not None), None)
    if model is None:
        model = LlamaEmbeddingClassifier(config)
    check_vocabulary(tokenizer, model.llama.vocab_size, config.pretrained_model_path)
    accelerate(model.llama)
    for method in methods:
        method.adapt(model)
    return model


def model_inputs(
    model: SentenceClassifier,
    methods: Sequence[Method],
    tokenizer: Tokenizer,
    *splits: list[Example],
) -> list[list[Example]]:
    """The examples as the model reads them: sentences, or what a method makes of them."""
    for method in methods:
        examples = method.examples(model, tokenizer, splits)
        if examples is not None:
            return examples
    return fit_context(*splits, max_len=model.llama.config.max_seq_len, keep="first")


def former_names(methods: Sequence[Method]) -> dict[str, str]:
    """Parts of tensor names in files of older versions, with today's."""
    return {old: new for method in methods for old, new in method.former_names.items()}
