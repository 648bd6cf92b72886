"""Fine-tuning the demo model beside bag-of-words logistic regression, on the same reviews.

    .venv/bin/python -m experiments.demo
    .venv/bin/python -m experiments.demo --data data/sst --n_train 1000 --lr 5e-4

The bags count words of two letters or more in lower case; C is the best of 0.1, 1 and
10 on dev. Fine-tuning is `run_llama.py --option finetune` with the flags given here. With
`--n_train` both see only so many lines of train, drawn at random.
"""

import random
import re
import subprocess
import tempfile
import time
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from experiments.runs import DEMO, run_llama
from minllama.common.program import ArgumentParser, run_script
from minllama.text.labelled import read_labelled


def bag_of_words(paths: dict[str, Path]) -> tuple[float, float]:
    """Accuracy on dev and test."""
    splits = {name: tuple(zip(*read_labelled(path), strict=True)) for name, path in paths.items()}
    vectorizer = CountVectorizer()
    train = vectorizer.fit_transform(splits["train"][1])
    best = (-1.0, -1.0)
    for c in (0.1, 1.0, 10.0):
        model = LogisticRegression(C=c, max_iter=3000).fit(train, splits["train"][0])
        dev, test = (
            model.score(vectorizer.transform(splits[name][1]), splits[name][0])
            for name in ("dev", "test")
        )
        best = max(best, (dev, test), key=lambda accuracies: accuracies[0])
    return best


def fine_tune(paths: dict[str, Path], flags: list[str], folder: str) -> tuple[float, float]:
    """Accuracy on dev and test of the epoch that is best on dev."""
    settings = {"option": "finetune", "pretrained-model-path": DEMO} | paths
    command = [*run_llama(settings), *flags]
    log = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True).stdout
    return tuple(float(a) for a in re.findall(r"^(?:dev|test) acc :: (\S+)", log, re.M))


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/demo/reviews", help="path up to -train.txt")
    parser.add_argument("--n_train", type=int)
    parser.add_argument("--lr", default="2e-5")
    parser.add_argument("--epochs", default="5")
    parser.add_argument("--batch_size", default="8")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = {
            name: Path(f"{args.data}-{name}.txt").resolve() for name in ("train", "dev", "test")
        }
        lines = paths["train"].read_text().splitlines(keepends=True)
        if args.n_train is not None:  # the file need not be in random order
            lines = random.Random(0).sample(lines, args.n_train)
        paths["train"] = Path(folder, "data-train.txt")
        paths["train"].write_text("".join(lines))
        print(f"{args.data}: {len(lines)} lines of train")
        print("bag of words: dev {:.3f}, test {:.3f}".format(*bag_of_words(paths)))
        start = time.perf_counter()
        flags = ["--lr", args.lr, "--epochs", args.epochs, "--batch_size", args.batch_size]
        accuracies = fine_tune(paths, flags, folder)
        print(
            "fine-tuned:   dev {:.3f}, test {:.3f}".format(*accuracies),
            f"({' '.join(flags)}; {time.perf_counter() - start:.0f} s)",
        )


if __name__ == "__main__":
    run_script(main)
