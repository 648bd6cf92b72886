"""Fine-tuning and prompting in the default mode against the reference's way of working.

    .venv/bin/python -m benchmarks.make_checkpoint random42M.pt
    .venv/bin/python -m benchmarks.finetune_speed --pretrained-model-path random42M.pt

Both ways take turns in one process on the same sentences, the first ones of each file; the table
gives the median time of a round, sentences per second, and the ratio.
"""

import argparse
import contextlib
import platform
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

import finetune
import prompting
from benchmarks.reference_way import reference_way

ROOT = Path(__file__).parent.parent


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pretrained-model-path", required=True)
    parser.add_argument("--tokenizer-path", default=str(ROOT / "tokenizer.model"))
    parser.add_argument("--data", default="sst", choices=("sst", "cfimdb"))
    parser.add_argument("--batch_size", type=int, default=80)
    parser.add_argument("--n_train", type=int, default=800, help="sentences of train")
    parser.add_argument("--n_dev", type=int, default=240, help="sentences of dev")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    flags = parse()
    torch.set_num_threads(flags.threads)
    print(
        f"{platform.machine()}, {flags.threads} threads, torch {torch.__version__}, {vars(flags)}"
    )
    ways = {"reference's way": reference_way, "default mode": contextlib.nullcontext}
    seconds = {(work, way): [] for work in ("finetune", "prompt") for way in ways}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        counts = {}
        for split, n in (("train", flags.n_train), ("dev", flags.n_dev)):
            source = ROOT / "data" / f"{flags.data}-{split}.txt"
            lines = source.read_text(encoding="utf-8").splitlines(keepends=True)[:n]
            Path(f"{split}.txt").write_text("".join(lines), encoding="utf-8")
            counts[split] = len(lines)
        args = argparse.Namespace(
            **vars(flags),
            train="train.txt",
            dev="dev.txt",
            test="dev.txt",
            label_names=str(ROOT / "data" / f"{flags.data}-label-mapping.json"),
            given={"label_names"},
            max_sentence_len=None,
            epochs=1,
            option="finetune",
            use_gpu=False,
            hidden_dropout_prob=0.3,
            lr=2e-5,
            filepath="best.pt",
        )
        for _ in range(flags.rounds):
            for way, patched in ways.items():
                with patched(), contextlib.redirect_stdout(None):
                    for work, kind, run in (
                        ("finetune", "finetuning", finetune.train),
                        ("prompt", "prompting", prompting.test_with_prompting),
                    ):
                        args.dev_out = f"dev-{kind}-output.txt"
                        args.test_out = f"test-{kind}-output.txt"
                        start = time.perf_counter()
                        run(args)
                        seconds[work, way].append(time.perf_counter() - start)
    sentences = {"finetune": counts["train"], "prompt": 2 * counts["dev"]}
    print(f"{'':10}{'way':18}{'seconds':>9}{'sentences/s':>13}{'ratio':>7}")
    for (work, way), times in seconds.items():
        ratio = median(seconds[work, "reference's way"]) / median(times)
        rate = sentences[work] / median(times)
        print(f"{work:10}{way:18}{median(times):9.1f}{rate:13.1f}{ratio:7.2f}")


if __name__ == "__main__":
    main()
