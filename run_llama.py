"""The command line: generate text, classify by prompting or fine-tuning, pre-train a model."""

import argparse
import re
from pathlib import Path

import methods
import pretrain
from dataset import LlamaDataset, create_data
from demo import use_demo
from evaluation import check_out_files, model_eval, write_predictions_to_file
from finetune import test, train
from generation import generate_sentence
from packing import DTYPES
from prompting import test_with_prompting
from saving import restore_settings, save_model
from tokenizer import TOKENIZER_MODEL
from training import check_dtype
from utils import (
    ArgumentParser,
    InputError,
    adder,
    check_outputs,
    declared,
    keep_freed_memory,
    number,
    run_script,
    seed_everything,
)

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

PREFIX = (
    "I have wanted to see this thriller for a while, and it didn't disappoint. "
    "Keanu Reeves, playing the hero John Wick, is"
)
ASSIGNMENT_FLAGS = {
    *("train", "dev", "test", "label_names", "pretrained_model_path", "max_sentence_len", "seed"),
    *("epochs", "option", "use_gpu", "generated_sentence_low_temp_out"),
    *("generated_sentence_high_temp_out", "dev_out", "test_out", "batch_size"),
    *("hidden_dropout_prob", "lr"),
}

TRAINING_FLAGS = {"grad_accum", "activation_checkpointing", "skip_train_eval"}


def make_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        description="Generate text, classify by prompting, fine-tune a classifier, or pre-train."
    )

    add = adder(parser)
    add("--train", default="data/cfimdb-train.txt", help="labelled sentences to train on")
    add("--dev", default="data/cfimdb-dev.txt", help="labelled sentences to choose by")
    add("--test", default="data/cfimdb-test.txt", help="labelled sentences to test on")
    add(
        "--label-names",
        default="data/cfimdb-label-mapping.json",
        help="JSON list of the labels' names; prompting needs it, fine-tuning checks against it",
    )
    add("--pretrained-model-path", default="stories42M.pt", help="the checkpoint to start from")
    add("--max_sentence_len", type=number(int, 1), help="keep this many tokens of a sentence")
    add("--seed", type=number(int, 0, 2**32 - 1), default=1337, help="of every random draw")
    add("--epochs", type=number(int, 1), default=5, help="passes over train")
    add(
        "--option",
        choices=("generate", "prompt", "finetune", "pretrain"),
        default="generate",
        help="what to do",
    )
    add("--use_gpu", action="store_true", help="run on CUDA, or else MPS")
    add(
        "--generated_sentence_low_temp_out",
        default="generated-sentence-temp-0.txt",
        help="file for the text generated at temperature 0",
    )
    add(
        "--generated_sentence_high_temp_out",
        default="generated-sentence-temp-1.txt",
        help="file for the text generated at temperature 1",
    )
    out_help = "file for the predictions on {}; by default named for the data and the option"
    add("--dev_out", default="cfimdb-dev-prompting-output.txt", help=out_help.format("dev"))
    add("--test_out", default="cfimdb-test-prompting-output.txt", help=out_help.format("test"))
    add("--batch_size", type=number(int, 1), default=8, help="sentences per batch")
    add("--hidden_dropout_prob", type=number(float, 0, 1), default=0.3, help="before the new head")
    add("--lr", type=number(float, 0), default=2e-5, help="learning rate")
    add(
        "--causal",
        action=argparse.BooleanOptionalAction,
        help="attend only to what came before, or to everything; by default as the checkpoint says",
    )
    add(
        "--tokenizer-path",
        help=f"SentencePiece model; by default {TOKENIZER_MODEL} beside the checkpoint, else here",
    )
    add(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of the weights when generating or prompting, where less pays with --causal on a CPU; "
        "of the products when training",
    )
    add("--prefix", default=PREFIX, help="the text to continue")
    add("--max_new_tokens", type=number(int, 0), default=75, help="number of tokens to generate")
    add("--grad_accum", type=number(int, 1), default=1, help="batches per step of training")
    add(
        "--activation_checkpointing",
        action="store_true",
        help="train in less memory, for the time of one more forward pass",
    )
    add(
        "--metrics_out",
        metavar="FILE.jsonl",
        help="with prompt and finetune, append accuracies, F1 and speeds as JSON lines",
    )
    add(
        "--report",
        action="store_true",
        help="with prompt and finetune, print every class's scores and the confusion matrix",
    )
    help = "do not evaluate train after every epoch of fine-tuning"
    add("--skip_train_eval", action="store_true", help=help)
    help = "with --option finetune: train nothing, evaluate what an earlier run saved"
    add("--load", metavar="CHECKPOINT", help=help)
    methods.add_arguments(parser)
    pretrain.add_arguments(parser)
    return parser


def get_args() -> argparse.Namespace:
    """Parse the command line, fill in what depends on other flags, and print the result.

    The assignment's flags are always printed, those that it does not have where they were given.

    Returns:
        every flag, and besides `given`, the names of those on the command line, and `filepath`,
        where fine-tuning keeps its best weights.
    """
    parser = make_parser()
    args = parser.parse_args()
    # Parsing into a namespace that has every name leaves those alone that the user did not give.
    unset = object()
    probe = parser.parse_args(namespace=argparse.Namespace(**dict.fromkeys(vars(args), unset)))
    given = frozenset(name for name, value in vars(probe).items() if value is not unset)

    if args.option == "pretrain":
        for name in pretrain.SHARED_DEFAULTS.keys() - given:
            setattr(args, name, pretrain.SHARED_DEFAULTS[name])
    if args.option == "finetune" and args.load is not None:
        restore_settings(args, given)
    check_flags(args, given)
    if args.option != "pretrain" and args.load is None:
        use_demo(args, given)
    if args.tokenizer_path is None:
        beside = Path(args.pretrained_model_path).parent / TOKENIZER_MODEL
        args.tokenizer_path = str(beside) if beside.is_file() else TOKENIZER_MODEL
    if args.option in ("prompt", "finetune") and given.isdisjoint({"dev_out", "test_out"}):
        name_out_files(args)
    shown = {
        name: value
        for name, value in vars(args).items()
        if name in ASSIGNMENT_FLAGS or name in given
    }
    print(f"args: {shown}")
    args.given = sorted(given)
    args.filepath = args.load or f"finetune-{args.epochs}-{args.lr}{methods.file_suffix(args)}.pt"
    return args


def check_flags(args: argparse.Namespace, given: frozenset[str]) -> None:
    """Refuse flags that would not act; the assignment's are taken with every option, as there.

    Raises:
        InputError: the first of them.
    """
    acting_with = methods.acting_with() | {
        "load": {"option": ("finetune",)},
        "skip_train_eval": {"option": ("finetune",)},
        "metrics_out": {"option": ("prompt", "finetune")},
        "report": {"option": ("prompt", "finetune")},
        "grad_accum": {"option": ("finetune", "pretrain")},
        "activation_checkpointing": {"option": ("finetune", "pretrain")},
        "prefix": {"option": ("generate",)},
        "max_new_tokens": {"option": ("generate",)},
    }
    for name in declared(pretrain.add_arguments):
        acting_with[name] = {"option": ("pretrain",)}
    for name in sorted(given & acting_with.keys()):
        settings = acting_with[name]
        if any(
            getattr(args, other) if values is None else getattr(args, other) in values
            for other, values in settings.items()
        ):
            continue
        needed = " or ".join(
            f"--{other} {' or '.join(values or ())}".rstrip() for other, values in settings.items()
        )
        raise InputError(f"--{name} acts only with {needed}; leave it out")
    if args.load is not None and (unused := given & TRAINING_FLAGS):
        raise InputError(f"--{min(unused)}: --load trains nothing; leave it out")


def name_out_files(args: argparse.Namespace) -> None:
    """Name the files of predictions for data set and option: data/sst-dev.txt is sst's dev."""
    kind = {"prompt": "prompting", "finetune": "finetuning"}[args.option]
    if methods.chosen(args):
        kind = "advanced"
    for split in ("dev", "test"):
        stem = Path(getattr(args, split)).stem
        dataset = re.sub(f"[-_.]?{split}$", "", stem) or "data"
        setattr(args, f"{split}_out", f"{dataset}-{split}-{kind}-output.txt")


def main() -> None:
    args = get_args()
    keep_freed_memory()
    seed_everything(args.seed)
    if args.option == "generate":
        outputs = {
            0.0: args.generated_sentence_low_temp_out,
            1.0: args.generated_sentence_high_temp_out,
        }
        check_outputs(outputs.values(), [args.pretrained_model_path, args.tokenizer_path])
        for temperature, outfile in outputs.items():
            generate_sentence(args, args.prefix, outfile, args.max_new_tokens, temperature)
    elif args.option == "prompt":
        test_with_prompting(args)
    elif args.option == "pretrain":
        pretrain.pretrain(args)
    else:
        check_dtype(args.dtype)
        if args.load is None:
            kinds = methods.out_file_kinds(args, "finetuning")
            check_out_files(args, kinds, args.filepath)
            train(args)
        test(args)


if __name__ == "__main__":
    run_script(main)
