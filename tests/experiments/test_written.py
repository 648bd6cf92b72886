"""Written words: which ones count, and which ones are in no source."""

from itertools import zip_longest

from experiments import written


def test_words_are_counted_in_lower_case():
    texts = ["The cat's hat.", "the HAT, a zog; Zog"]
    n_words, unknown = written.count(texts, {"the", "hat", "cat"})
    assert n_words == 9
    assert unknown == {"zog": 2, "s": 1, "a": 1}


class TwoTexts:
    """Stands in for a batch: tokens are characters, and one text ends before the limit of 7."""

    def __init__(self, generator, prompts, sampling, max_new_tokens):
        self.texts = list(prompts)

    @property
    def rows(self):
        return [[1, *map(ord, text)] for text in self.texts]

    def text(self, row):
        return self.texts[row]

    def __iter__(self):
        for characters in zip_longest(" one tw", " end", fillvalue=""):
            self.texts = [text + c for text, c in zip(self.texts, characters, strict=True)]
            yield


def test_a_word_that_the_limit_of_tokens_cuts_is_left_out(monkeypatch):
    monkeypatch.setattr(written, "GenerationBatch", TwoTexts)
    monkeypatch.setattr(written, "MAX_NEW_TOKENS", 7)
    assert written.continuations(None, ["a", "b"]) == [" one ", " end"]
