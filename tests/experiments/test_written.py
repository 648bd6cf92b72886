"""What a model writes: which words are counted, and which are in no source."""

from conftest import make_llama

from experiments import written
from minllama.inference.sampling import Sampling


class Letters:
    """A tokenizer whose pieces are characters."""

    def encode(self, text, bos, eos):
        return [1] * bos + [ord(c) for c in text]

    def decode(self, ids):
        return "".join(chr(i) for i in ids if i > 2)


def test_words_are_counted_by_their_lower_case():
    n_words, unknown = written.count(
        ["The cat's hat.", "the HAT, a zog; Zog"], {"the", "hat", "cat"}
    )
    assert n_words == 9
    assert unknown == {"zog": 2, "s": 1, "a": 1}


def test_a_word_that_the_limit_cut_is_not_counted(monkeypatch):
    def decode(_, prompts, max_new_tokens, sampling):
        assert (prompts, sampling) == ([[1, 97], [1, 98]], Sampling(1.0))
        added = [*" one tw"], [*" end.", *[None] * 2]
        yield from ([ord(c) if c else None for c in step] for step in zip(*added, strict=True))

    monkeypatch.setattr(written, "decode", decode)
    monkeypatch.setattr(written, "MAX_NEW_TOKENS", 7)
    assert written.continuations(None, Letters(), ["a", "b"]) == [" one ", " end."]


def test_rows_that_are_decoded_together_continue_their_own_prompts(tokenizer):
    llama = make_llama(causal=True)
    prompts = ["a warm and funny", "the plot"]
    together = written.continuations(llama, tokenizer, prompts, temperature=0.0)
    alone = [written.continuations(llama, tokenizer, [p], temperature=0.0)[0] for p in prompts]
    assert together == alone
    assert any(together)
