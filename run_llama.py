"""The command line: generate text, classify by prompting or fine-tuning, pre-train a model."""

if __name__ == "__main__":  # the imports below take seconds
    from minllama.common.program import end_at_interrupt

    end_at_interrupt()

import argparse
from collections.abc import Callable
from typing import Any

from minllama import methods
from minllama.common.errors import InputError
from minllama.common.flags import (
    ASSIGNMENT_FLAGS,
    ClassifySettings,
    TaskSettings,
    TrainSettings,
)
from minllama.common.program import ArgumentParser, run_script
from minllama.common.settings import add_flags
from minllama.evaluation.classification import model_eval, write_predictions_to_file
from minllama.methods.base import Method
from minllama.methods.saved import save_model
from minllama.methods.settings import FinetuneSettings
from minllama.tasks.finetune import finetune, test, train
from minllama.tasks.generate import GenerateSettings, generate, generate_sentence
from minllama.tasks.predict import PredictSettings, predict
from minllama.tasks.pretrain import PretrainSettings, pretrain
from minllama.tasks.prompt import PromptSettings, ZeroShotSettings, prompt, test_with_prompting
from minllama.text.labelled import LlamaDataset, create_data
from minllama.training import distributed
from utils import seed_everything

TQDM_DISABLE = False  # the environment's TQDM_DISABLE=1 hides the progress bars

__all__ = [
    "TQDM_DISABLE",
    "LlamaDataset",
    "create_data",
    "generate_sentence",
    "get_args",
    "model_eval",
    "save_model",
    "seed_everything",
    "test",
    "test_with_prompting",
    "train",
    "write_predictions_to_file",
]


OPTIONS: dict[str, tuple[type[TaskSettings], Callable[[Any], None]]] = {
    "generate": (GenerateSettings, generate),
    "prompt": (PromptSettings, prompt),
    "finetune": (FinetuneSettings, finetune),
    "pretrain": (PretrainSettings, pretrain),
    "predict": (PredictSettings, predict),
}
SHARED = (TaskSettings, ClassifySettings, ZeroShotSettings, TrainSettings)


def make_parser() -> argparse.ArgumentParser:
    """A parser whose Namespace has only the flags on the command line."""
    parser = ArgumentParser(
        usage="%(prog)s [--option OPTION] [flags of all options, of this one, and of methods]",
        description="Generate text, classify by prompting, fine-tune a classifier, or pre-train.",
        epilog="Methods of fine-tuning are off unless one of their flags is given.",
    )
    options = [settings for settings, _ in OPTIONS.values()]
    add_flags(parser, [*SHARED, *options, *methods.METHODS])
    return parser


def get_args() -> TaskSettings:
    """Parse the command line into the settings of its option, and print the assignment's line.

    That line always has the assignment's flags, and others if they were given.

    Raises:
        InputError: a flag is wrong, or would have no effect.
    """
    explicit = vars(make_parser().parse_args())
    settings_class, _ = OPTIONS[explicit.get("option", "generate")]
    settings = settings_class.from_flags(explicit)
    reject_unused_flags(settings)
    settings = settings.resolved()
    flags = settings.to_dict()
    more = [name for name in flags if name in settings.explicit and name not in ASSIGNMENT_FLAGS]
    if settings.option != "predict":  # predict writes only results to standard output
        shown = {name: flags[name] for name in (*ASSIGNMENT_FLAGS, *more)}
        print(f"args: {shown}")
    return settings


def reject_unused_flags(settings: TaskSettings) -> None:
    """Refuse flags without effect. Every option accepts the assignment's, as its script does.

    Raises:
        InputError: for the first of them.
    """
    values = settings.to_dict()
    for name in settings.explicit:
        if name in settings.defaults():
            continue
        its_methods = [cls for cls in methods.METHODS if name in cls.defaults()]
        is_on = any(cls.is_on(values) for cls in its_methods)
        if not (isinstance(settings, FinetuneSettings) and is_on):
            raise InputError(
                f"--{name} acts only with {required_flags(name, its_methods)}; leave it out"
            )


def required_flags(name: str, its_methods: list[type[Method]]) -> str:
    """The flags that make a flag act, such as "--option prompt or --prompt_based"."""
    switches = [cls.required_flag(name) for cls in its_methods]
    options = [
        option
        for option, (settings_class, _) in OPTIONS.items()
        if name in settings_class.defaults() or (None in switches and option == "finetune")
    ]
    needed = [f"--option {' or '.join(options)}"] if options else []
    return " or ".join(needed + [switch for switch in switches if switch is not None])


def main() -> None:
    with distributed.process_group():
        settings = get_args()
        distributed.assert_same_on_all_ranks(settings.to_dict())
        seed_everything(settings.seed)
        _, run_option = OPTIONS[settings.option]
        run_option(settings)


if __name__ == "__main__":
    run_script(main)
