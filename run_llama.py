"""The command line: generate text, classify by prompting or fine-tuning, pre-train a model."""

if __name__ == "__main__":  # the imports below take seconds
    from minllama.common.program import end_at_interrupt

    end_at_interrupt()

import argparse
import contextlib
from typing import Any

from minllama import methods
from minllama.checkpoints import formats
from minllama.common.errors import InputError, explain_out_of_memory
from minllama.common.flags import (
    ASSIGNMENT_FLAGS,
    ClassifySettings,
    CompileSettings,
    TaskSettings,
    TrainSettings,
)
from minllama.common.program import ArgumentParser, outliving_output, run_script
from minllama.common.settings import add_flags
from minllama.evaluation.classification import model_eval, write_predictions_to_file
from minllama.kernels.cpu import keep_freed_memory
from minllama.methods.saved import save_model
from minllama.tasks.finetune import FinetuneSettings, finetune, test, train
from minllama.tasks.generate import GenerateSettings, generate, generate_sentence
from minllama.tasks.predict import PredictSettings, predict
from minllama.tasks.pretrain import PretrainSettings, pretrain
from minllama.tasks.prompt import AskingSettings, PromptSettings, test_with_prompting
from minllama.text.labelled import LlamaDataset, create_data
from minllama.training import distributed
from utils import seed_everything

__all__ = [
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

OPTIONS = {  # of --option: the settings, and what is done with them
    "generate": (GenerateSettings, generate),
    "prompt": (PromptSettings, test_with_prompting),
    "finetune": (FinetuneSettings, finetune),
    "pretrain": (PretrainSettings, pretrain),
    "predict": (PredictSettings, predict),
}
SHARED = (TaskSettings, ClassifySettings, AskingSettings, CompileSettings, TrainSettings)


def make_parser() -> argparse.ArgumentParser:
    """A parser whose Namespace has only those flags that were given."""
    parser = ArgumentParser(
        usage="%(prog)s [--option OPTION] [flags of all options, of this one, and of methods]",
        description="Generate text, classify by prompting, fine-tune a classifier, or pre-train.",
        epilog="Methods of fine-tuning are off unless one of their flags is given.",
    )
    options = (settings for settings, _ in OPTIONS.values())
    add_flags(parser, [*SHARED, *options, *methods.flag_classes()])
    return parser


def get_args() -> argparse.Namespace:
    """Parse the command line, fill in what depends on other flags, and print the result.

    The assignment's flags are always printed, those that it does not have where they were given.

    Returns:
        every flag of the option, and besides `explicit`, the names of those on the command line.
        For fine-tuning also the flags of all methods, and `filepath` of the best weights.

    Raises:
        InputError: a flag is wrong, or would not act.
    """
    return shown(given_settings())


def given_settings() -> TaskSettings:
    """What the command line says, and what depends on that."""
    given = vars(make_parser().parse_args())
    settings_class, _ = OPTIONS[given.get("option", "generate")]
    values = settings_class.from_saved_run(given)
    reject_unused_flags(settings_class, values, sorted(given))
    settings = settings_class.from_args(argparse.Namespace(**values, explicit=sorted(given)))
    return settings.resolved()


def shown(settings: TaskSettings) -> argparse.Namespace:
    """Print the settings, and return them as `get_args` does."""
    flags = settings.to_dict()
    more = [name for name in flags if name in settings.explicit and name not in ASSIGNMENT_FLAGS]
    if settings.shows_args:
        print(f"args: { {name: flags[name] for name in (*ASSIGNMENT_FLAGS, *more)} }")
    return argparse.Namespace(**flags)


def reject_unused_flags(
    settings_class: type[TaskSettings], values: dict[str, Any], given: list[str]
) -> None:
    """Refuse flags that would not act; the assignment's are taken with every option, as there.

    Args:
        values: of all flags that are not at their defaults.

    Raises:
        InputError: for the first of them.
    """
    for name in given:
        if name in settings_class.defaults():
            continue
        owners = [cls for cls in methods.METHODS if name in cls.defaults()]
        is_on = name in methods.Tuning.defaults() or any(cls.is_on(values) for cls in owners)
        if settings_class.takes_methods and is_on:
            continue
        raise InputError(f"--{name} acts only with {what_acts(name, owners)}; leave it out")


def what_acts(name: str, owners: list[type[methods.Method]]) -> str:
    """What has to be given so that a flag acts: "--option prompt or --prompt_based"."""
    switches = [cls.needed_for(name) for cls in owners]
    acts_alone = name in methods.Tuning.defaults() or None in switches
    options = [
        option
        for option, (cls, _) in OPTIONS.items()
        if name in cls.defaults() or (acts_alone and cls.takes_methods)
    ]
    needed = [f"--option {' or '.join(options)}"] if options else []
    return " or ".join(needed + [switch for switch in switches if switch is not None])


def verify_checkpoints(paths: list[str]) -> None:
    """Compare checkpoints with their checksums.

    Raises:
        InputError: one is damaged, or there is nothing to compare.
    """
    if not paths:
        raise InputError("--verify: no checkpoint is read; leave it out")
    for path in paths:
        formats.verify(path)


def main() -> None:
    with distributed.joined():
        settings = given_settings()
        with outliving_output() if settings.outlives_output else contextlib.nullcontext():
            run(shown(settings))


def run(args: argparse.Namespace) -> None:
    """Do what --option says."""
    settings_class, do = OPTIONS[args.option]
    if distributed.n_processes() > 1 and not settings_class.takes_processes:
        raise InputError(f"--option {args.option}: runs in one process; leave torchrun out")
    distributed.agree(vars(args) | {"code": distributed.digest_of_code()})
    if args.verify:
        verify_checkpoints(settings_class.from_args(args).checkpoints)
    if settings_class.keeps_freed_memory:
        keep_freed_memory()
    seed_everything(args.seed)
    with explain_out_of_memory(f"--option {args.option} ran", settings_class.less_memory):
        do(args)


if __name__ == "__main__":
    with distributed.ending_at_once():
        run_script(main)
