"""The text around a sentence that asks for its label."""

from collections.abc import Sequence

from minllama.common.errors import InputError
from minllama.text.labelled import Example
from tokenizer import Tokenizer

TEMPLATE = "{sentence} Is this movie {labels}? This movie is "  # the assignment's


def frame(template: str, label_names: Sequence[str]) -> tuple[str, str]:
    """What stands before a sentence and after it.

    Raises:
        InputError: the template has no `{sentence}`, or several.
    """
    if template.count("{sentence}") != 1:
        raise InputError(f"--prompt_template {template!r}: it must have {{sentence}} in it, once")
    before, after = template.split("{sentence}")
    if len(label_names) == 2:
        choices = " or ".join(label_names)
    else:
        choices = f"{', '.join(label_names[:-1])}, or {label_names[-1]}"
    return before.replace("{labels}", choices), after.replace("{labels}", choices)


def make_prompts(
    data: Sequence[Example],
    template: str,
    label_names: Sequence[str],
    tokenizer: Tokenizer,
    *,
    causal: bool,
) -> list[Example]:
    """Put the template around tokenized sentences.

    Without a mask this is the assignment's way: the whole text is tokenized, and the tokenizer may
    cut it. For a causal model the template stays whole, however short the sentence was cut, without
    its last space so that the label's name begins with a word. What stands before the sentence, the
    sentence, and what stands after it are tokenized apart, as words with a space between them.
    """
    before, after = frame(template, label_names)
    if not causal:
        texts = [(f"{before}{sentence}{after}", label) for sentence, label, _ in data]
        return [
            Example(text, label, tokenizer.encode(text, bos=True, eos=False))
            for text, label in texts
        ]
    after = after.rstrip()
    head, tail = (
        tokenizer.encode(text.strip(), bos=False, eos=False, truncate=False)
        for text in (before, after)
    )
    return [
        Example(f"{before}{sentence}{after}", label, [*ids[:1], *head, *ids[1:], *tail])
        for sentence, label, ids in data
    ]
