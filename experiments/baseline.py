"""What a sceptic would use: TF-IDF of words and pairs of words, with logistic regression.

    .venv/bin/python -m experiments.baseline --data data/sst
    .venv/bin/python -m experiments.baseline --data data/sst --unlabelled reviews.txt

It is fitted on train; the strength of the regularization is the one that is best on dev. With
`--unlabelled`, a text of documents between lines `<|endoftext|>`, it has read what a language model
may read that is pre-trained on the same: they count in the inverse document frequencies, and beside
the words stand the coordinates of a truncated SVD of their TF-IDF (latent semantic analysis).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.sparse
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer

from experiments.corpus import read_documents
from minllama.common.errors import InputError
from minllama.common.program import ArgumentParser, run_script
from minllama.text.batches import Example
from minllama.text.labelled import few_shot, read_labelled
from tokenizer import Tokenizer

CS = (0.5, 1.0, 3.0, 10.0)  # inverses of the strength of the regularization
WORDS = {"sublinear_tf": True, "token_pattern": r"\S+"}
N_COMPONENTS, MIN_DOCUMENTS = 300, 20  # of the SVD; that a word is in


class SvdFeatures:
    """TF-IDF of words and pairs of words, and where a truncated SVD of unlabelled texts puts them.

    Args:
        train: the labelled sentences, whose words and pairs count.
        unlabelled: documents for the inverse document frequencies and the SVD.

    Raises:
        InputError: too few words are in `MIN_DOCUMENTS` of the documents or more.
    """

    def __init__(self, train: Sequence[str], unlabelled: Sequence[str]):
        vocabulary = TfidfVectorizer(ngram_range=(1, 2), **WORDS).fit(train).vocabulary_
        self.words = TfidfVectorizer(ngram_range=(1, 2), vocabulary=vocabulary, **WORDS)
        self.words.fit([*train, *unlabelled])
        self.svd = make_pipeline(
            TfidfVectorizer(min_df=MIN_DOCUMENTS, dtype=np.float32, **WORDS),
            TruncatedSVD(N_COMPONENTS, random_state=0),
            Normalizer(copy=False),
        )
        try:
            self.svd.fit(unlabelled)
        except ValueError as error:
            raise InputError(f"the unlabelled texts are too few: {error}") from error

    def transform(self, sentences: Sequence[str]) -> scipy.sparse.csr_matrix:
        """Sentences to a row of features each."""
        return scipy.sparse.hstack(
            [self.words.transform(sentences), self.svd.transform(sentences)], format="csr"
        )


def baseline(
    data: str,
    shots: int | None = None,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
    unlabelled: Sequence[str] | None = None,
) -> dict:
    """Fit on train, choose `C` on dev.

    Args:
        data: path up to `-train.txt`.
        shots: how many sentences of each label are drawn from train with the seed, as `--shots`
            does; None takes all.
        tokenizer: count its pieces in place of words.
        unlabelled: see `SvdFeatures`; None is for the words and pairs of words of train alone.

    Returns:
        `dev` and `test`, each with its `accuracy`; `trained_parameters`; `C`.
    """
    splits = {split: read_labelled(f"{data}-{split}.txt") for split in ("train", "dev", "test")}
    if shots is not None:
        rows = [Example(sentence, label, []) for label, sentence in splits["train"]]
        num_labels = 1 + max(label for label, _ in splits["train"])
        drawn = few_shot(rows, shots, num_labels, seed)
        splits["train"] = [(label, sentence) for sentence, label, _ in drawn]
    y = {split: [label for label, _ in rows] for split, rows in splits.items()}
    texts = {split: [sentence for _, sentence in rows] for split, rows in splits.items()}
    if tokenizer is not None:
        for split, sentences in texts.items():
            ids = (tokenizer.encode(sentence, bos=False, eos=False) for sentence in sentences)
            texts[split] = [" ".join(map(str, pieces)) for pieces in ids]
    if unlabelled is not None:
        vectorizer = SvdFeatures(texts["train"], unlabelled)
    else:
        vectorizer = TfidfVectorizer(ngram_range=(1, 2), **WORDS).fit(texts["train"])
    x = {split: vectorizer.transform(sentences) for split, sentences in texts.items()}
    models = [LogisticRegression(C=c, max_iter=1000).fit(x["train"], y["train"]) for c in CS]
    best = max(models, key=lambda model: model.score(x["dev"], y["dev"]))
    return {
        "dev": {"accuracy": best.score(x["dev"], y["dev"])},
        "test": {"accuracy": best.score(x["test"], y["test"])},
        "trained_parameters": best.coef_.size + best.intercept_.size,
        "C": best.C,
    }


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="data/sst", help="path up to -train.txt")
    help = "count this tokenizer's pieces in place of words"
    parser.add_argument("--tokenizer-path", metavar="FILE", help=help)
    help = "a text that it has read before, documents between lines <|endoftext|>"
    parser.add_argument("--unlabelled", type=Path, metavar="FILE", help=help)
    args = parser.parse_args()
    unlabelled = None if args.unlabelled is None else read_documents(args.unlabelled)
    if unlabelled is not None and args.tokenizer_path is not None:
        raise InputError("--unlabelled does not go with --tokenizer-path; leave one out")
    tokenizer = args.tokenizer_path and Tokenizer(tokenizer_model=args.tokenizer_path)
    result = baseline(args.data, tokenizer=tokenizer, unlabelled=unlabelled)
    print(
        f"TF-IDF and logistic regression, C {result['C']:g}: "
        f"dev {result['dev']['accuracy']:.3f}, test {result['test']['accuracy']:.3f}, "
        f"{result['trained_parameters']:,} parameters"
    )


if __name__ == "__main__":
    run_script(main)
