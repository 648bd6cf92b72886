"""Fine-tuning in the reference's way of working, in the default mode, and causally, in one run.

    .venv/bin/python -m benchmarks.make_checkpoint random42M.pt
    .venv/bin/python -m benchmarks.finetune --pretrained-model-path random42M.pt --data data/sst
    .venv/bin/python -m benchmarks.finetune --pretrained-model-path random42M.pt \\
        --data data/cfimdb --batch_size 10

Four ways take turns: (a) unmasked float32 as the reference works, (b) the same with this
repository's code, (c) causal float32, (d) causal bfloat16. In each round every way forms the
batches of an epoch, sorts them by their longest row, and takes some evenly from the whole range:
of train to train on, of dev to evaluate. The table gives rates in sentences per second and their
ratios to (a); an epoch trains on train and evaluates train and dev, at these rates. The last line
compares (d), counting real tokens only, with the machine's rate of bfloat16 products, and tells
how much of its time goes into making batches.
"""

import argparse
import contextlib
import random
import time
from dataclasses import dataclass
from statistics import median

import torch
from torch.utils.data import DataLoader

from benchmarks.reference_way import model_eval_with_autograd, reference_way
from benchmarks.ways import WAYS, loader_for, make_parser, print_settings
from classifier import LlamaEmbeddingClassifier
from minllama.checkpoints.pt import read_checkpoint
from minllama.common.program import run_script
from minllama.evaluation.classification import model_eval
from minllama.kernels.cpu import accelerate, keep_freed_memory
from minllama.methods.saved import ClassifierConfig
from minllama.tasks.epoch import ClassificationLoss, train_epoch
from minllama.text.labelled import encode, fit_context, read_labelled
from minllama.training.precision import mixed_precision
from optimizer import AdamW
from tokenizer import Tokenizer
from utils import seed_everything

DEVICE = torch.device("cpu")


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__, batch_size=80)
    parser.add_argument("--batches", type=int, default=8, help="of each round")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def spread(loader: DataLoader, n: int) -> DataLoader:
    """Some batches of an epoch, evenly from the shortest to the longest."""
    data, batches = loader.dataset, list(loader.batch_sampler)
    batches.sort(key=lambda rows: max(len(data[i][2]) for i in rows))
    chosen = [batches[(2 * i + 1) * len(batches) // (2 * n)] for i in range(n)]
    random.shuffle(chosen)
    return DataLoader(data, batch_sampler=chosen, collate_fn=loader.collate_fn)


@dataclass
class Work:
    """What a way has done, and in how many seconds."""

    sentences: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loading: float = 0.0  # seconds of them, that batches took to be made

    @property
    def rate(self) -> float:
        return self.sentences / self.seconds

    def add(self, loader: DataLoader, seconds: float) -> None:
        start = time.perf_counter()
        for _ in loader:
            pass
        self.loading += time.perf_counter() - start
        rows = [loader.dataset[i] for batch in loader.batch_sampler for i in batch]
        self.sentences += len(rows)
        self.tokens += sum(len(ids) for _, _, ids in rows)
        self.seconds += seconds


class Way:
    """A model and its loaders for one way of working."""

    def __init__(
        self,
        flags: argparse.Namespace,
        causal: bool,
        dtype: str,
        reference: bool,
        num_labels: int,
    ):
        config = ClassifierConfig(
            pretrained_model_path=flags.pretrained_model_path,
            num_labels=num_labels,
            option="finetune",
            hidden_dropout_prob=0.3,
            causal=causal,
        )
        torch.manual_seed(0)
        self.model = LlamaEmbeddingClassifier(config)
        if not reference:
            accelerate(self.model)
        self.dtype = dtype
        self.patched = reference_way if reference else contextlib.nullcontext
        self.evaluate_all = model_eval_with_autograd if reference else model_eval
        tokenizer = Tokenizer(tokenizer_model=flags.tokenizer_path)
        files = [f"{flags.data}-{split}.txt" for split in ("train", "dev")]
        max_len = self.model.llama.config.max_seq_len
        train, dev = fit_context(
            *(encode(read_labelled(file), tokenizer) for file in files),
            max_len=max_len,
            keep="first",
        )
        self.sizes = len(train), len(dev)
        way = {"causal": causal, "reference": reference}
        self.train_loader = loader_for(train, flags.batch_size, tokenizer, **way, shuffle=True)
        self.dev_loader = loader_for(dev, flags.batch_size, tokenizer, **way)
        self.optimizer = AdamW(self.model.parameters(), lr=2e-5)
        self.loss = ClassificationLoss(flags.batch_size, DEVICE, dtype)
        self.forget()

    def forget(self) -> None:
        self.trained, self.evaluated = Work(), Work()

    def run(self, seed: int, n_batches: int) -> None:
        """Train on some batches and evaluate some, on the clock."""
        seed_everything(seed)
        loader, dev_loader = (
            spread(self.train_loader, n_batches),
            spread(self.dev_loader, n_batches),
        )
        with self.patched():
            start = time.perf_counter()
            train_epoch(self.model, loader, self.optimizer, self.loss, 0)
            trained = time.perf_counter()
            with mixed_precision(DEVICE, self.dtype):
                self.evaluate_all(dev_loader, self.model, DEVICE)
            evaluated = time.perf_counter()
        self.trained.add(loader, trained - start)
        self.evaluated.add(dev_loader, evaluated - trained)

    def epoch_seconds(self) -> float:
        """Of training on train and evaluating train and dev."""
        n_train, n_dev = self.sizes
        return n_train / self.trained.rate + (n_train + n_dev) / self.evaluated.rate


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
    keep_freed_memory()
    print_settings(flags)
    num_labels = 1 + max(label for label, _ in read_labelled(f"{flags.data}-train.txt"))
    ways = {name: Way(flags, *way, num_labels) for name, way in WAYS.items()}
    rate = product_rate()
    for round_number in range(-1, flags.rounds):
        order = list(ways.values())
        for way in order[:: 1 if round_number % 2 else -1]:
            way.run(round_number + 1, flags.batches)
            if round_number < 0:  # warm-up
                way.forget()

    (reference, *_), fastest = ways.values(), ways["d causal bfloat16"]
    print(f"{'':32}{'train':>16}{'evaluate':>16}{'epoch':>8}")
    for name, way in ways.items():
        cells = [
            f"{mine.rate:10.1f}{mine.rate / its.rate:6.2f}"
            for mine, its in (
                (way.trained, reference.trained),
                (way.evaluated, reference.evaluated),
            )
        ]
        ratio = reference.epoch_seconds() / way.epoch_seconds()
        print(f"{name:32}{''.join(cells)}{ratio:8.2f}")

    weights = read_checkpoint(flags.pretrained_model_path)["model"]
    n_weights = sum(t.numel() for name, t in weights.items() if name.startswith("layers."))
    reached = 6 * n_weights * fastest.trained.tokens / fastest.trained.seconds
    print(
        f"(d) trains at {reached / 1e9:.0f} GFLOP/s of real tokens, "
        f"{reached / rate:.0%} of the {rate / 1e9:.0f} GFLOP/s of a bfloat16 product; "
        f"its batches take {fastest.trained.loading / fastest.trained.seconds:.2%} of the time"
    )


if __name__ == "__main__":
    run_script(main)
