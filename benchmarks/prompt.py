"""Zero-shot prompting in the reference's way of working, in the default mode, and causally.

    .venv/bin/python -m benchmarks.make_checkpoint random42M.pt
    .venv/bin/python -m benchmarks.prompt --pretrained-model-path random42M.pt --data data/sst
    .venv/bin/python -m benchmarks.prompt --pretrained-model-path random42M.pt --data data/cfimdb \\
        --n_dev 40

Four ways take turns on the same sentences, drawn from dev: (a) unmasked float32 as the reference
works, (b) the same with this repository's code, (c) causal float32, (d) causal bfloat16. The
table gives the median rate of a round in sentences per second and its ratio to (a).
"""

import argparse
import contextlib
import random
import time
from statistics import median

import torch

from benchmarks.reference_way import reference_way
from benchmarks.ways import WAYS, loader_for, make_parser, print_settings
from classifier import LlamaZeroShotClassifier
from minllama.common.program import run_script
from minllama.evaluation.classification import model_eval
from minllama.kernels.cpu import accelerate, keep_freed_memory
from minllama.kernels.quantize import pack
from minllama.tasks.prompt import ZeroShotConfig
from minllama.text.labelled import encode, fit_context, load_label_names, read_labelled
from minllama.text.prompts import TEMPLATE, make_prompts
from tokenizer import Tokenizer

DEVICE = torch.device("cpu")


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__, batch_size=10)
    parser.add_argument("--n_dev", type=int, default=320, help="sentences to classify")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


class Way:
    """A model and its prompts for one way of working."""

    def __init__(self, flags: argparse.Namespace, causal: bool, dtype: str, reference: bool):
        names = load_label_names(f"{flags.data}-label-mapping.json")
        tokenizer = Tokenizer(tokenizer_model=flags.tokenizer_path)
        config = ZeroShotConfig(
            pretrained_model_path=flags.pretrained_model_path,
            num_labels=len(names),
            causal=causal,
        )
        self.model = LlamaZeroShotClassifier(config, tokenizer, names)
        if not reference:
            accelerate(self.model)
        if causal:
            pack(self.model.llama, dtype)
        self.patched = reference_way if reference else contextlib.nullcontext
        data = encode(read_labelled(f"{flags.data}-dev.txt"), tokenizer)
        data = random.Random(0).sample(data, min(flags.n_dev, len(data)))
        data = make_prompts(data, TEMPLATE, names, tokenizer, causal=causal)
        (data,) = fit_context(data, max_len=self.model.max_prompt_len, keep="last")
        self.loader = loader_for(
            data, flags.batch_size, tokenizer, causal=causal, reference=reference
        )
        self.times: list[float] = []

    def run(self) -> None:
        """Classify all sentences, on the clock."""
        with self.patched():
            start = time.perf_counter()
            model_eval(self.loader, self.model, DEVICE)
            self.times.append(time.perf_counter() - start)


def main() -> None:
    flags = parse()
    torch.set_num_threads(flags.threads)
    keep_freed_memory()
    print_settings(flags)
    ways = {name: Way(flags, *way) for name, way in WAYS.items()}
    for round_number in range(-1, flags.rounds):
        order = list(ways.values())
        for way in order[:: 1 if round_number % 2 else -1]:
            way.run()
            if round_number < 0:  # warm-up
                way.times.clear()
    reference = median(next(iter(ways.values())).times)
    n = len(way.loader.dataset)
    print(f"{'way':32}{'sentences/s':>12}{'ratio':>7}")
    for name, way in ways.items():
        seconds = median(way.times)
        print(f"{name:32}{n / seconds:12.1f}{reference / seconds:7.2f}")


if __name__ == "__main__":
    run_script(main)
