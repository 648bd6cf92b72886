"""The text of reviews on which pre-training is continued."""

import pytest

from experiments.reviews import as_treebank, is_tokenized, make_text

pytest.importorskip("nltk")

REVIEW = "I can't say (yet) that it's good. \"Big\" is and/or isn't. It cost $5, maybe?"


def test_tokens_are_those_of_the_two_data_sets():
    assert as_treebank(REVIEW, brackets=True) == (
        "I ca n't say -LRB- yet -RRB- that it 's good . `` Big '' is and\\/or is n't . "
        "It cost $ 5 , maybe ?"
    )
    assert as_treebank(REVIEW, brackets=False) == (
        "I ca n't say ( yet ) that it 's good . \" Big \" is and/or is n't . It cost $ 5 , maybe ?"
    )


def test_what_is_tokenized_stays():
    tokenized = "the film , which is n't bad , ends . i liked it ."
    assert is_tokenized(tokenized) and not is_tokenized(REVIEW)
    assert make_text([tokenized] * 20, None) == [tokenized] * 20


def test_half_are_tokenized_and_a_smaller_text_begins_a_larger_one():
    documents = [f"{REVIEW} This is number {i}." for i in range(400)]
    whole = make_text(documents, None)
    kinds = ["-LRB-" in text for text in whole], ["( yet )" in text for text in whole]
    assert all(70 < sum(kind) < 130 for kind in kinds)
    small = make_text(documents, 0.01)
    assert small == whole[: len(small)] and 10_000 <= sum(map(len, small)) < 10_200
