"""The baseline of the report: TF-IDF of words and word pairs, with logistic regression.

It is fitted on train, and the strength of its regularization is chosen on dev. It may also learn
from unlabelled texts, as a language model does in pre-training.
"""

from collections.abc import Sequence

import numpy as np
import scipy.sparse
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer

from minllama.common.errors import InputError
from minllama.text.labelled import few_shot, read_labelled

CS = (0.5, 1.0, 3.0, 10.0)  # inverses of the strength of the regularization
WORDS = {"sublinear_tf": True, "token_pattern": r"\S+"}
N_COMPONENTS, MIN_DOCUMENTS = 300, 20  # of the SVD; documents that have a word at least


class SvdFeatures:
    """TF-IDF of words and word pairs, and their coordinates in a truncated SVD (LSA).

    Args:
        train: labelled sentences, whose words and pairs count.
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
        """The features `(sentences, features)`."""
        return scipy.sparse.hstack(
            [self.words.transform(sentences), self.svd.transform(sentences)], format="csr"
        )


def baseline(
    data: str, shots: int | None = None, seed: int = 0, unlabelled: Sequence[str] | None = None
) -> dict:
    """Fit on train, choose `C` on dev.

    Args:
        data: path up to `-train.txt`.
        shots: sentences of each label, drawn from train with the seed as `--shots` does; None takes
            all.
        unlabelled: as `SvdFeatures` takes them; None leaves the SVD out.

    Returns:
        `dev` and `test`, each with its `accuracy`; `trained_parameters`; `C`.
    """
    splits = {split: read_labelled(f"{data}-{split}.txt") for split in ("train", "dev", "test")}
    if shots is not None:
        num_labels = 1 + max(example.label for example in splits["train"])
        splits["train"] = few_shot(splits["train"], shots, num_labels, seed)
    y = {split: [s.label for s in sentences] for split, sentences in splits.items()}
    texts = {split: [s.sentence for s in sentences] for split, sentences in splits.items()}
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
