"""The baseline of the report: TF-IDF of words and word pairs, with logistic regression.

It is fitted on train, and the strength of its regularization is chosen on dev. It may also learn
from unlabelled texts, as a language model does in pre-training.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import Normalizer

from minllama.common.errors import InputError
from minllama.text.batches import Example
from minllama.text.labelled import few_shot, read_labelled

CS = (0.5, 1.0, 3.0, 10.0)  # inverses of the strength of the regularization
WORDS = {"sublinear_tf": True, "token_pattern": r"\S+"}
N_COMPONENTS, MIN_DOCUMENTS = 300, 20  # of the SVD; documents that have a word at least


def read_splits(data: str) -> dict[str, list[Example]]:
    """Train, dev and test; `data` is a path up to `-train.txt`."""
    return {split: read_labelled(f"{data}-{split}.txt") for split in ("train", "dev", "test")}


def fit_features(train: Sequence[str], unlabelled: Sequence[str] | None) -> Any:
    """TF-IDF of words and word pairs; with unlabelled texts their truncated SVD (LSA) too.

    Args:
        train: sentences, whose words and pairs count.
        unlabelled: documents for the inverse document frequencies and the SVD.

    Raises:
        InputError: too few words are in `MIN_DOCUMENTS` of the documents or more.
    """
    words = TfidfVectorizer(ngram_range=(1, 2), **WORDS).fit(train)
    if unlabelled is None:
        return words
    words = TfidfVectorizer(ngram_range=(1, 2), vocabulary=words.vocabulary_, **WORDS)
    svd = make_pipeline(
        TfidfVectorizer(min_df=MIN_DOCUMENTS, dtype=np.float32, **WORDS),
        TruncatedSVD(N_COMPONENTS, random_state=0),
        Normalizer(copy=False),
    )
    try:
        svd.fit(unlabelled)
    except ValueError as error:
        raise InputError(f"the unlabelled texts are too few: {error}") from error
    return FeatureUnion([("words", words.fit([*train, *unlabelled])), ("svd", svd)])


def fit_classifier(
    splits: dict[str, list[Example]], features: Any, cs: Sequence[float], max_iter: int
) -> dict[str, Any]:
    """Fit a logistic regression on train for each `C` of `cs`, and choose the best on dev.

    Returns:
        `dev` and `test`, each with its `accuracy`; `trained_parameters`; `C`.
    """
    y = {split: [s.label for s in sentences] for split, sentences in splits.items()}
    x = {split: features.transform([s.sentence for s in splits[split]]) for split in splits}
    if len(set(y["train"])) < 2:
        raise InputError("the training sentences have one label only; take more of them")
    models = [LogisticRegression(C=c, max_iter=max_iter).fit(x["train"], y["train"]) for c in cs]
    best = max(models, key=lambda model: model.score(x["dev"], y["dev"]))
    return {
        "dev": {"accuracy": best.score(x["dev"], y["dev"])},
        "test": {"accuracy": best.score(x["test"], y["test"])},
        "trained_parameters": best.coef_.size + best.intercept_.size,
        "C": best.C,
    }


def baseline(
    data: str, shots: int | None = None, seed: int = 0, unlabelled: Sequence[str] | None = None
) -> dict[str, Any]:
    """Fit the baseline; returns what `fit_classifier` does.

    Args:
        data: path up to `-train.txt`.
        shots: sentences of each label, drawn from train with the seed as `--shots` does; None takes
            all.
        unlabelled: documents, as `fit_features` takes them.
    """
    splits = read_splits(data)
    if shots is not None:
        num_labels = 1 + max(example.label for example in splits["train"])
        splits["train"] = few_shot(splits["train"], shots, num_labels, seed)
    features = fit_features([s.sentence for s in splits["train"]], unlabelled)
    return fit_classifier(splits, features, CS, max_iter=1000)
