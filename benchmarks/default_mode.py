"""The default mode (unmasked, float32) against the reference's way of working, in one run.

    .venv/bin/python -m benchmarks.make_checkpoint random42M.pt
    .venv/bin/python -m benchmarks.default_mode --pretrained-model-path random42M.pt

Both ways take turns on the same sentences of SST-5, the first of its files. The table gives the
median rate of a round in sentences per second, and the ratio: for training, for the evaluations
after an epoch, for both as an epoch has them (train, evaluate train, evaluate dev), and for
prompting.
"""

import argparse
import contextlib
import functools
import platform
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch

from benchmarks.reference_way import model_eval_with_autograd, reference_way
from classifier import LlamaEmbeddingClassifier, LlamaZeroShotClassifier
from dataset import create_data, load_label_names
from evaluation import model_eval
from finetune import classification_loss, make_loader, train_epoch
from optimizer import AdamW
from prompting import question
from tokenizer import Tokenizer

DATA = Path(__file__).parent.parent / "data"
DEVICE = torch.device("cpu")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pretrained-model-path", required=True)
    parser.add_argument("--tokenizer-path", default="tokenizer.model")
    parser.add_argument("--batch_size", type=int, default=80, help="of fine-tuning")
    parser.add_argument("--prompt_batch_size", type=int, default=10)
    parser.add_argument("--n_train", type=int, default=480, help="sentences to train on")
    parser.add_argument("--n_dev", type=int, default=160, help="sentences to evaluate on")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def seconds(run, *args) -> float:
    start = time.perf_counter()
    run(*args)
    return time.perf_counter() - start


def main() -> None:
    flags = parse()
    torch.set_num_threads(flags.threads)
    torch.manual_seed(0)
    print(f"{platform.machine()}, torch {torch.__version__}, {vars(flags)}")
    args = SimpleNamespace(**vars(flags), max_sentence_len=None)
    prompt_args = SimpleNamespace(**vars(args) | {"batch_size": flags.prompt_batch_size})
    names = load_label_names(DATA / "sst-label-mapping.json")
    config = SimpleNamespace(
        pretrained_model_path=flags.pretrained_model_path,
        num_labels=len(names),
        option="finetune",
        hidden_dropout_prob=0.3,
    )
    tokenizer = Tokenizer(tokenizer_model=flags.tokenizer_path)
    classifier = LlamaEmbeddingClassifier(config)
    zero_shot = LlamaZeroShotClassifier(config, tokenizer, names)
    load = functools.partial(create_data, tokenizer=tokenizer, flag="test", eos=False)
    train_data = load(DATA / "sst-train.txt")[: flags.n_train]
    dev_data = load(DATA / "sst-dev.txt")[: flags.n_dev]
    prompts = load(DATA / "sst-dev.txt", prompt_suffix=question(names))[: flags.n_dev]
    train_loader = make_loader(train_data, classifier, args, shuffle=True)
    dev_loader = make_loader(dev_data, classifier, args)
    prompt_loader = make_loader(prompts, zero_shot, prompt_args)
    optimizer = AdamW(classifier.parameters(), lr=2e-5)
    loss = functools.partial(classification_loss, batch_size=flags.batch_size)

    ways = {
        "reference's way": (reference_way, model_eval_with_autograd),
        "default mode": (contextlib.nullcontext, model_eval),
    }
    times = {way: {"train": [], "evaluate": [], "prompt": []} for way in ways}
    train_epoch(classifier, dev_loader, optimizer, loss, 0)  # warm-up
    for round_number in range(flags.rounds):
        order = list(ways.items())
        for way, (patched, evaluate) in order[:: 1 if round_number % 2 else -1]:
            with patched():
                torch.manual_seed(round_number)  # the same batches for both
                times[way]["train"].append(
                    seconds(train_epoch, classifier, train_loader, optimizer, loss, 0)
                )
                times[way]["evaluate"].append(
                    seconds(evaluate, train_loader, classifier, DEVICE)
                    + seconds(evaluate, dev_loader, classifier, DEVICE)
                )
                times[way]["prompt"].append(seconds(model_eval, prompt_loader, zero_shot, DEVICE))

    n_train, n_dev = len(train_data), len(dev_data)
    print(f"{'work':10}{'way':18}{'sentences/s':>12}{'ratio':>7}")
    for work, n in (("train", n_train), ("evaluate", n_train + n_dev), ("prompt", n_dev)):
        for way in ways:
            ratio = median(times["reference's way"][work]) / median(times[way][work])
            print(f"{work:10}{way:18}{n / median(times[way][work]):12.1f}{ratio:7.2f}")
    reference, ours = (median(t["train"]) + median(t["evaluate"]) for t in times.values())
    print(f"an epoch with its evaluations: ratio {reference / ours:.2f}")


if __name__ == "__main__":
    main()
