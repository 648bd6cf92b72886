"""Fine-tuning in the reference's way of working, in the default mode, and causally, in one run.

    .venv/bin/python -m benchmarks.make_checkpoint random42M.pt
    .venv/bin/python -m benchmarks.finetune --pretrained-model-path random42M.pt --data data/sst
    .venv/bin/python -m benchmarks.finetune --pretrained-model-path random42M.pt \\
        --data data/cfimdb --batch_size 10 --n_train 60 --n_dev 40

Four ways take turns on the same sentences, drawn from train and dev: (a) unmasked float32 as the
reference works, (b) the same with this repository's code, (c) causal float32, (d) causal bfloat16.
The table gives the median rate of a round in sentences per second and its ratio to (a): for
training, for evaluation, and for an epoch as both have it (train, evaluate train and dev). The
last line compares (d), counting real tokens only, with the machine's rate of bfloat16 products.
"""

import argparse
import contextlib
import functools
import platform
import random
import time
from statistics import median
from types import SimpleNamespace

import torch

from base_llama import read_checkpoint
from batching import make_loader
from benchmarks.reference_way import model_eval_with_autograd, reference_way
from classifier import LlamaEmbeddingClassifier
from dataset import Example, encode_labelled, fit_context, read_labelled
from evaluation import model_eval
from finetune import classification_loss, train_epoch
from optimizer import AdamW
from tokenizer import Tokenizer
from training import mixed_precision

DEVICE = torch.device("cpu")
WAYS = {  # causal, dtype, as the reference works
    "a unmasked float32, reference": (False, "float32", True),
    "b unmasked float32": (False, "float32", False),
    "c causal float32": (True, "float32", False),
    "d causal bfloat16": (True, "bfloat16", False),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pretrained-model-path", required=True)
    parser.add_argument("--tokenizer-path", default="tokenizer.model")
    parser.add_argument("--data", default="data/sst", help="path up to -train.txt")
    parser.add_argument("--batch_size", type=int, default=80)
    parser.add_argument("--n_train", type=int, default=480, help="sentences to train on")
    parser.add_argument("--n_dev", type=int, default=160, help="sentences to evaluate on")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def sample(path: str, n: int, tokenizer: Tokenizer, max_len: int) -> list[Example]:
    """Some sentences of a file, the same ones in every run."""
    data = random.Random(0).sample(encode_labelled(path, tokenizer), n)
    return fit_context(data, max_len=max_len, keep="first")[0]


class Way:
    """A model and its loaders for one way of working."""

    def __init__(self, flags, causal: bool, dtype: str, reference: bool, num_labels: int):
        args = SimpleNamespace(**vars(flags), max_sentence_len=None)
        config = SimpleNamespace(
            pretrained_model_path=flags.pretrained_model_path,
            num_labels=num_labels,
            option="finetune",
            hidden_dropout_prob=0.3,
            causal=causal,
        )
        torch.manual_seed(0)
        self.model = LlamaEmbeddingClassifier(config)
        self.dtype = dtype
        self.patched = reference_way if reference else contextlib.nullcontext
        self.evaluate_all = model_eval_with_autograd if reference else model_eval
        max_len = self.model.llama.config.max_seq_len
        tokenizer = Tokenizer(tokenizer_model=flags.tokenizer_path)
        train = sample(f"{flags.data}-train.txt", flags.n_train, tokenizer, max_len)
        dev = sample(f"{flags.data}-dev.txt", flags.n_dev, tokenizer, max_len)
        self.n_tokens = sum(len(ids) for _, _, ids in train)
        self.train_loader = make_loader(train, args, causal=causal, shuffle=True)
        self.eval_loaders = [
            make_loader(train, args, causal=True) if causal else self.train_loader,
            make_loader(dev, args, causal=causal),
        ]
        self.optimizer = AdamW(self.model.parameters(), lr=2e-5)
        self.loss = functools.partial(classification_loss, batch_size=flags.batch_size, dtype=dtype)
        self.times: dict[str, list[float]] = {"train": [], "evaluate": []}

    def run(self, seed: int) -> None:
        """Train an epoch and evaluate, on the clock."""
        torch.manual_seed(seed)
        with self.patched():
            start = time.perf_counter()
            train_epoch(self.model, self.train_loader, self.optimizer, self.loss, 0)
            trained = time.perf_counter()
            with mixed_precision(DEVICE, self.dtype):
                for loader in self.eval_loaders:
                    self.evaluate_all(loader, self.model, DEVICE)
            evaluated = time.perf_counter()
        self.times["train"].append(trained - start)
        self.times["evaluate"].append(evaluated - trained)


def product_rate(size: int = 2048, rounds: int = 10) -> float:
    """Floating-point operations per second of a bfloat16 matrix product."""
    a, b = torch.randn(2, size, size).bfloat16()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * size**3 / median(times)


def main() -> None:
    flags = parse()
    torch.set_num_threads(flags.threads)
    print(f"{platform.machine()}, torch {torch.__version__}, {vars(flags)}")
    num_labels = 1 + max(label for label, _ in read_labelled(f"{flags.data}-train.txt"))
    ways = {name: Way(flags, *way, num_labels) for name, way in WAYS.items()}
    rate = product_rate()
    for round_number in range(-1, flags.rounds):
        order = list(ways.values())
        for way in order[:: 1 if round_number % 2 else -1]:
            way.run(round_number + 1)
            if round_number < 0:  # warm-up
                way.times = {"train": [], "evaluate": []}

    sentences = {"train": flags.n_train, "evaluate": flags.n_train + flags.n_dev}
    reference = next(iter(ways.values()))
    print(f"{'work':10}{'way':32}{'sentences/s':>12}{'ratio':>7}")
    for work, n in sentences.items():
        for name, way in ways.items():
            seconds = median(way.times[work])
            ratio = median(reference.times[work]) / seconds
            print(f"{work:10}{name:32}{n / seconds:12.1f}{ratio:7.2f}")
    epochs = {name: sum(median(t) for t in way.times.values()) for name, way in ways.items()}
    for name, seconds in epochs.items():
        print(f"{'epoch':10}{name:32}{'':12}{next(iter(epochs.values())) / seconds:7.2f}")

    fastest = ways["d causal bfloat16"]
    weights = read_checkpoint(flags.pretrained_model_path)["model"]
    n_weights = sum(t.numel() for name, t in weights.items() if name.startswith("layers."))
    reached = 6 * n_weights * fastest.n_tokens / median(fastest.times["train"])
    print(
        f"(d) trains at {reached / 1e9:.0f} GFLOP/s of real tokens, "
        f"{reached / rate:.0%} of the {rate / 1e9:.0f} GFLOP/s of a bfloat16 product"
    )


if __name__ == "__main__":
    main()
