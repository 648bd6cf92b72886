"""Words that a model writes at temperature 1 and no source text has, and profanity.

    .venv/bin/python -m experiments.written --sources OUTPUT/sources.txt
    .venv/bin/python -m experiments.written --sources OUTPUT/sources.txt --seeds 200

Ten prompts are continued by 75 tokens with each seed: 20 seeds give 200 texts. Prompts do not
count, nor does a last word that the 75 tokens cut. The demo model is the default; OUTPUT comes from
`experiments.corpus`.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import torch

from experiments.corpus import has_offensive_word, read_documents, words_of
from experiments.runs import DEMO
from minllama.common.program import positive, run_script, script_parser
from minllama.inference.generator import GenerationBatch, TextGenerator
from minllama.inference.sampling import Sampling

PROMPTS = (
    "Once upon a time",
    "One day, a little girl named Lily",
    "The old man looked at the sea and",
    "There was a king who had three sons.",
    "It was a dark and stormy night.",
    "The dog ran into the garden and",
    '"Where are you going?" asked',
    "When the train stopped, Mr. Brown",
    "My mother told me that",
    "The film begins with",
)
MAX_NEW_TOKENS = 75


def continuations(generator: TextGenerator, prompts: Sequence[str]) -> list[str]:
    """Continue prompts in one batch, at temperature 1.

    Returns:
        the continuations, without a last word that the limit of tokens cut.
    """
    batch = GenerationBatch(generator, prompts, Sampling(), MAX_NEW_TOKENS)
    starts = [len(ids) for ids in batch.rows]
    for _ in batch:
        pass
    texts = []
    for i, prompt in enumerate(prompts):
        text = batch.text(i).removeprefix(prompt)
        is_cut = len(batch.rows[i]) - starts[i] == MAX_NEW_TOKENS
        texts.append(re.sub(r"[A-Za-z]+$", "", text) if is_cut else text)
    return texts


def count(texts: Iterable[str], words: Collection[str]) -> tuple[int, Counter[str]]:
    """The number of words in some texts, and the counts of those that are not in `words`."""
    written = Counter(word for text in texts for word in words_of(text))
    unknown = Counter({word: n for word, n in written.items() if word not in words})
    return written.total(), unknown


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--sources", type=Path, required=True, help="all source texts in one")
    parser.add_argument("--pretrained-model-path", default=str(DEMO))
    parser.add_argument("--tokenizer-path", help="by default the one beside the model")
    parser.add_argument("--seeds", type=positive, default=20)
    args = parser.parse_args()
    words = frozenset(words_of("\n".join(read_documents(args.sources))))
    generator = TextGenerator(args.pretrained_model_path, args.tokenizer_path, causal=True)
    texts: list[str] = []
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        texts += continuations(generator, PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        n_words, unknown = count(texts[i :: len(PROMPTS)], words)
        print(f"{prompt!r}: {unknown.total()} of {n_words:,} words are in no source text")
    n_words, unknown = count(texts, words)
    print(f"{len(texts)} texts, {n_words:,} words")
    print(f"in no source text: {unknown.total()} ({unknown.total() / max(n_words, 1):.2%})")
    print(*unknown)
    flagged = [text for text in texts if has_offensive_word(text)]
    print(f"texts with profanity or slurs: {len(flagged)}")
    for text in flagged:
        print(repr(text))


if __name__ == "__main__":
    run_script(main)
