"""Prompts: the text around a sentence that asks for its label."""

from collections.abc import Sequence

from minllama.common.errors import InputError
from minllama.text.batches import Example
from tokenizer import Tokenizer

TEMPLATE = "{sentence} Is this movie {labels}? This movie is "  # the assignment's


def fill_template(template: str, label_names: Sequence[str]) -> tuple[str, str]:
    """Fill the labels into a template, which has one `{sentence}`: the text before and after it."""
    if template.count("{sentence}") != 1:
        raise InputError(f"--prompt_template {template!r}: it must have {{sentence}} in it, once")
    before, after = template.split("{sentence}")
    if len(label_names) == 2:
        choices = " or ".join(label_names)
    else:
        choices = f"{', '.join(label_names[:-1])}, or {label_names[-1]}"
    return before.replace("{labels}", choices), after.replace("{labels}", choices)


def make_prompts(
    examples: Sequence[Example],
    template: str,
    label_names: Sequence[str],
    tokenizer: Tokenizer,
    *,
    causal: bool,
) -> list[Example]:
    """Put the template around tokenized sentences.

    Without a mask the whole text is tokenized and truncated, as in the assignment. For a causal
    model only the sentence is truncated, and the texts before and after it are tokenized apart; the
    last space of the template is left out, since the label's name begins with one.
    """
    before, after = fill_template(template, label_names)
    if not causal:
        prompts = [(f"{before}{sentence}{after}", label) for sentence, label, _ in examples]
        return [Example(p, label, tokenizer.encode(p, True, False)) for p, label in prompts]
    after = after.rstrip()
    head = tokenizer.encode(before.strip(), bos=False, eos=False, truncate=False)
    tail = tokenizer.encode(after.strip(), bos=False, eos=False, truncate=False)
    return [
        Example(f"{before}{sentence}{after}", label, [*ids[:1], *head, *ids[1:], *tail])
        for sentence, label, ids in examples
    ]
