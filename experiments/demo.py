"""Fine-tuning the demo model beside logistic regression on bags of words, on the same sentences.

    .venv/bin/python -m experiments.demo
    .venv/bin/python -m experiments.demo --data data/sst --n_train 1000 --lr 2e-4

The bags count words of two letters or more in lower case; C is the best of 0.1, 1 and 10 on dev.
`--n_train` draws so many lines of train at random.
"""

import random
import shutil
import tempfile
from pathlib import Path

from sklearn.feature_extraction.text import CountVectorizer

from experiments.baseline import fit_classifier, read_splits
from experiments.runs import classify
from minllama.common.errors import InputError
from minllama.common.program import positive, run_script, script_parser
from minllama.text.lines import lines_of


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--data", default="data/demo/reviews", help="path up to -train.txt")
    parser.add_argument("--n_train", type=positive)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--epochs", type=positive, default=5)
    parser.add_argument("--batch_size", type=positive, default=8)
    flags = vars(parser.parse_args())
    data, n_train = flags.pop("data"), flags.pop("n_train")
    with tempfile.TemporaryDirectory() as folder:
        if n_train is not None:  # at random, since the file need not be in random order
            for name in ("dev.txt", "test.txt", "label-mapping.json"):
                shutil.copy(f"{data}-{name}", f"{folder}/data-{name}")
            lines = [f"{line}\n" for line in lines_of(f"{data}-train.txt")]
            if n_train > len(lines):
                raise InputError(f"--n_train {n_train}: {data}-train.txt has {len(lines)} lines")
            data = f"{folder}/data"
            Path(f"{data}-train.txt").write_text("".join(random.Random(0).sample(lines, n_train)))
        splits = read_splits(data)
        bags = CountVectorizer().fit([example.sentence for example in splits["train"]])
        results = {"bag of words": fit_classifier(splits, bags, (0.1, 1, 10), max_iter=3000)}
        results["fine-tuned"] = classify(data, flags)
    if "diverged" in results["fine-tuned"]:
        raise InputError(f"--lr {flags['lr']}: the loss was not finite; lower it")
    for name, result in results.items():
        print(f"{name}: dev {result['dev']['accuracy']:.3f}, test {result['test']['accuracy']:.3f}")


if __name__ == "__main__":
    run_script(main)
