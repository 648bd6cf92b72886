"""Film reviews without labels in one text, on which pre-training is continued: a reader of reviews.

    .venv/bin/python -m pip install -r benchmarks/requirements.txt
    .venv/bin/python -m experiments.reviews CORPORA/imdb.txt.xz CORPORA/cornell_polarity2.txt.xz \\
        --out reviews.txt
    .venv/bin/python -m experiments.reviews CORPORA/imdb.txt.xz --megabytes 10 --out reviews10.txt

SST-5 and CFIMDB are tokenized as the Penn Treebank is: "is n't", " ." So half of the reviews, drawn
at random, are too, half of these with the Treebank's quotes and brackets as in SST-5, and half
with plain ones as in CFIMDB. What is tokenized already, in lower case, stays as it is. The reviews
are shuffled; a smaller text is the beginning of a larger one.
"""

import random
import re
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

from common.errors import InputError
from common.files import atomic_write, check_outputs
from common.program import ArgumentParser, run_script
from experiments.corpus import joined, read_documents

SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[\"'(]?[A-Z])")


def as_treebank(text: str, brackets: bool) -> str:
    """A text with the Penn Treebank's tokens apart, sentence by sentence.

    Args:
        brackets: write brackets, quotes and slashes as SST-5 does: -LRB-, ``, \\/. Otherwise they
            stay, as in CFIMDB.
    """
    from nltk.tokenize import TreebankWordTokenizer

    tokenizer = TreebankWordTokenizer()
    tokens = [
        token
        for sentence in SENTENCE_END.split(text)
        for token in tokenizer.tokenize(sentence, convert_parentheses=brackets)
    ]
    if brackets:
        return " ".join(tokens).replace("/", "\\/")
    return re.sub(r"``|''", '"', " ".join(tokens))


def is_tokenized(text: str) -> bool:
    """Whether full stops and commas stand apart from the words before them."""
    return len(re.findall(r" [.,]", text)) > len(re.findall(r"\w[.,]\s", text))


def make_text(documents: list[str], megabytes: float | None, seed: int = 0) -> list[str]:
    """Documents in random order, a quarter as in SST-5 and a quarter as in CFIMDB.

    Args:
        megabytes: about so many of UTF-8, in units of 10⁶ bytes; None takes all.
    """
    rng = random.Random(seed)
    documents = rng.sample(documents, len(documents))
    kept, size = [], 0
    for document in documents:
        if megabytes is not None and size >= megabytes * 1e6:
            break
        draw = rng.random()
        if draw < 0.5 and not is_tokenized(document):
            document = as_treebank(document, brackets=draw < 0.25)
        kept.append(document)
        size += len(document.encode())
    return kept


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("corpora", type=Path, nargs="+", help="xz-compressed texts of reviews")
    parser.add_argument("--megabytes", type=float, help="about so much of them; by default all")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.megabytes is not None and not args.megabytes > 0:
        raise InputError(f"--megabytes {args.megabytes}: must be greater than 0")
    check_outputs([args.out], args.corpora)
    documents = [document for path in args.corpora for document in read_documents(path)]
    try:
        kept = make_text(documents, args.megabytes)
    except ImportError as error:
        raise InputError(
            "NLTK is not installed; `python -m pip install -r benchmarks/requirements.txt`"
        ) from error
    with atomic_write(args.out) as file:
        file.write(joined(kept))
    print(f"{args.out}: {len(kept):,} reviews, {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_script(main)
