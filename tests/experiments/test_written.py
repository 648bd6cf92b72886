"""Written words: which ones count, and which ones are in no source."""

from experiments import written


def test_words_are_counted_in_lower_case():
    texts = ["The cat's hat.", "the HAT, a zog; Zog"]
    n_words, unknown = written.count(texts, {"the", "hat", "cat"})
    assert n_words == 9
    assert unknown == {"zog": 2, "s": 1, "a": 1}
