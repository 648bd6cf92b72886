"""What a sceptic would use: TF-IDF of words and pairs of words, with logistic regression.

.venv/bin/python -m benchmarks.baseline --data data/sst
"""

import argparse
import functools
import time

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score

from dataset import read_labelled
from prompt_based import few_shot

STRENGTHS = (0.5, 1.0, 3.0, 10.0)


@functools.cache
def baseline(data: str, shots: int | None = None, seed: int = 0) -> dict:
    """Fit on train, choose the strength of the regularization on dev.

    Args:
        data: path up to `-train.txt`.
        shots: how many sentences of each label are drawn from train with the seed, as `--shots`
            does; None takes all.

    Returns:
        `dev` and `test`, each with its `accuracy`; `seconds`; `trained_parameters`; `strength`.
    """
    start = time.perf_counter()
    files = [read_labelled(f"{data}-{split}.txt") for split in ("train", "dev", "test")]
    if shots is not None:
        rows = [(sentence, label, []) for label, sentence in files[0]]
        num_labels = 1 + max(label for label, _ in files[0])
        files[0] = [(label, text) for text, label, _ in few_shot(rows, shots, num_labels, seed)]
    labels, texts = zip(*(zip(*file, strict=True) for file in files), strict=True)
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\S+")
    train, dev, test = (
        vectorizer.fit_transform(texts[0]),
        *(vectorizer.transform(split) for split in texts[1:]),
    )
    models = [LogisticRegression(C=c, max_iter=1000).fit(train, labels[0]) for c in STRENGTHS]
    best = max(models, key=lambda model: accuracy_score(labels[1], model.predict(dev)))
    return {
        "dev": {"accuracy": accuracy_score(labels[1], best.predict(dev))},
        "test": {"accuracy": accuracy_score(labels[2], best.predict(test))},
        "seconds": time.perf_counter() - start,
        "trained_parameters": best.coef_.size + best.intercept_.size,
        "strength": best.C,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="data/sst", help="path up to -train.txt")
    result = baseline(parser.parse_args().data)
    print(
        f"TF-IDF and logistic regression, C {result['strength']:g}: "
        f"dev {result['dev']['accuracy']:.3f}, test {result['test']['accuracy']:.3f}, "
        f"{result['trained_parameters']:,} parameters"
    )


if __name__ == "__main__":
    main()
