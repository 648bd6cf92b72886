"""What a sceptic would use: TF-IDF of words and pairs of words, with logistic regression.

    .venv/bin/python -m experiments.baseline --data data/sst

It is fitted on train; the strength of the regularization is the one that is best on dev.
"""

import time

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from common.program import ArgumentParser, run_script
from text.labelled import few_shot, read_labelled
from tokenizer import Tokenizer

CS = (0.5, 1.0, 3.0, 10.0)  # inverses of the strength of the regularization


def baseline(
    data: str, shots: int | None = None, seed: int = 0, tokenizer: Tokenizer | None = None
) -> dict:
    """Fit on train, choose `C` on dev.

    Args:
        data: path up to `-train.txt`.
        shots: how many sentences of each label are drawn from train with the seed, as `--shots`
            does; None takes all.
        tokenizer: count its pieces in place of words.

    Returns:
        `dev` and `test`, each with its `accuracy`; `seconds`; `trained_parameters`; `C`.
    """
    start = time.perf_counter()
    splits = {split: read_labelled(f"{data}-{split}.txt") for split in ("train", "dev", "test")}
    if shots is not None:
        rows = [(sentence, label, []) for label, sentence in splits["train"]]
        num_labels = 1 + max(label for label, _ in splits["train"])
        drawn = few_shot(rows, shots, num_labels, seed)
        splits["train"] = [(label, sentence) for sentence, label, _ in drawn]
    y = {split: [label for label, _ in rows] for split, rows in splits.items()}
    texts = {split: [sentence for _, sentence in rows] for split, rows in splits.items()}
    if tokenizer is not None:
        for split, sentences in texts.items():
            ids = (tokenizer.encode(sentence, bos=False, eos=False) for sentence in sentences)
            texts[split] = [" ".join(map(str, pieces)) for pieces in ids]
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\S+")
    x = {"train": vectorizer.fit_transform(texts["train"])}
    x |= {split: vectorizer.transform(texts[split]) for split in ("dev", "test")}
    models = [LogisticRegression(C=c, max_iter=1000).fit(x["train"], y["train"]) for c in CS]
    best = max(models, key=lambda model: model.score(x["dev"], y["dev"]))
    return {
        "dev": {"accuracy": best.score(x["dev"], y["dev"])},
        "test": {"accuracy": best.score(x["test"], y["test"])},
        "seconds": time.perf_counter() - start,
        "trained_parameters": best.coef_.size + best.intercept_.size,
        "C": best.C,
    }


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="data/sst", help="path up to -train.txt")
    help = "count this tokenizer's pieces in place of words"
    parser.add_argument("--tokenizer-path", metavar="FILE", help=help)
    args = parser.parse_args()
    tokenizer = args.tokenizer_path and Tokenizer(tokenizer_model=args.tokenizer_path)
    result = baseline(args.data, tokenizer=tokenizer)
    print(
        f"TF-IDF and logistic regression, C {result['C']:g}: "
        f"dev {result['dev']['accuracy']:.3f}, test {result['test']['accuracy']:.3f}, "
        f"{result['trained_parameters']:,} parameters"
    )


if __name__ == "__main__":
    run_script(main)
