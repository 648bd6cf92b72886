"""A text of unlabelled film reviews for domain adaptation, by continued pre-training.

    .venv/bin/python -m pip install -r benchmarks/requirements.txt
    .venv/bin/python -m experiments.reviews aclImdb_v1.tar.gz review_polarity.tar.gz \\
        --out reviews.txt
    .venv/bin/python -m experiments.reviews aclImdb_v1.tar.gz --megabytes 10 --out reviews10.txt

The archives are those of ai.stanford.edu/~amaas/data/sentiment (Maas et al. 2011) and
www.cs.cornell.edu/people/pabo/movie-review-data (polarity 2.0). Of a .tar.gz every .txt file in a
folder `pos`, `neg` or `unsup` is a review; labels are not used. Other files are texts as
`experiments.corpus` reads them.

CFIMDB's reviews are of IMDB too. Reviews that share ten words in a row with dev or test of SST-5 or
CFIMDB, which have to be in `data/`, are left out and counted. This cannot find shorter sentences.

SST-5 and CFIMDB have the tokens of the Penn Treebank: "is n't", " ." So half of the reviews, drawn
at random, get them too: a quarter of all with the Treebank's quotes and brackets as in SST-5, a
quarter with plain ones as in CFIMDB. Reviews that have them already stay as they are. The reviews
are shuffled; a smaller text is the beginning of a larger one.
"""

import gzip
import html
import math
import random
import re
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path

from experiments.corpus import read_documents, runs_of, words_of, write_documents
from experiments.task_text import CFIMDB, SST
from minllama.common.errors import InputError, missing_file
from minllama.common.files import check_outputs
from minllama.common.program import run_script, script_parser
from minllama.text.labelled import read_labelled

RUN = 10  # words in a row that a review may not share with dev and test
IN_ARCHIVE = re.compile(r"(?:^|/)(?:pos|neg|unsup)/[^/]+\.txt$")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[\"'(]?[A-Z])")


def read_reviews(path: Path) -> list[str]:
    """The reviews of an archive, decoded from HTML, or of a text; or an error of the user."""
    if not path.name.endswith((".tar.gz", ".tgz")):
        return read_documents(path)
    if not path.is_file():
        raise missing_file(path)
    reviews = []
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                file = archive.extractfile(member) if IN_ARCHIVE.search(member.name) else None
                if file is not None:
                    reviews.append(without_html(file.read()))
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: not a whole .tar.gz file; download it again") from error
    reviews = [review for review in reviews if review]
    if not reviews:
        raise InputError(f"{path}: no .txt file with a text in a folder pos, neg or unsup")
    return reviews


def without_html(content: bytes) -> str:
    """Decode UTF-8, else Latin-1, and HTML's line breaks and entities."""
    try:
        text = content.decode()
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    return html.unescape(re.sub(r"(?:<br ?/?>\s*)+", "\n", text, flags=re.IGNORECASE)).strip()


def plain_words(text: str) -> list[str]:
    """The words in lower case; the Treebank's "is n't" is one word, its brackets are none."""
    text = re.sub(r"-[lr][rcs]b-", " ", text.lower())
    text = re.sub(r"(?<=[a-z]) (?=n't\b|'(?:s|m|d|ll|re|ve)\b)", "", text)
    return words_of(text.replace("'", ""))


def without_evaluated(reviews: Iterable[str]) -> list[str]:
    """The reviews that share no `RUN` words in a row with dev or test of SST-5 and CFIMDB."""
    evaluated: set[int] = set()
    for name in (f"{data}-{split}.txt" for data in (SST, CFIMDB) for split in ("dev", "test")):
        for sentence, *_ in read_labelled(name):
            evaluated.update(runs_of(plain_words(sentence), RUN))
    return [text for text in reviews if evaluated.isdisjoint(runs_of(plain_words(text), RUN))]


def as_treebank(text: str, brackets: bool) -> str:
    """Separate the tokens of a text as the Penn Treebank does, sentence by sentence.

    Args:
        brackets: write brackets, quotes and slashes as SST-5 does: -LRB-, ``, \\/.
    """
    try:
        from nltk.tokenize import TreebankWordTokenizer
    except ImportError:
        raise InputError("needs NLTK; `pip install -r benchmarks/requirements.txt`") from None
    tokenizer = TreebankWordTokenizer()
    tokens: list[str] = []
    for sentence in SENTENCE_END.split(text):
        tokens += tokenizer.tokenize(sentence, convert_parentheses=brackets)
    if brackets:
        return " ".join(tokens).replace("/", "\\/")
    return re.sub(r"``|''", '"', " ".join(tokens))


def is_tokenized(text: str) -> bool:
    """Whether full stops and commas are separated from the words before them."""
    return len(re.findall(r" [.,]", text)) > len(re.findall(r"\w[.,]\s", text))


def make_text(documents: list[str], megabytes: float | None, seed: int = 0) -> list[str]:
    """Shuffle documents; a quarter gets SST-5's tokens, a quarter CFIMDB's.

    Args:
        megabytes: about so many of UTF-8 (10⁶ bytes); None takes all.
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
    parser = script_parser(__doc__)
    parser.add_argument("corpora", type=Path, nargs="+", help="archives or texts of reviews")
    parser.add_argument("--megabytes", type=float, help="about so much of them; by default all")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.megabytes is not None and not 0 < args.megabytes < math.inf:
        raise InputError(f"--megabytes {args.megabytes}: need a number greater than 0")
    check_outputs([args.out], args.corpora)
    everything = [review for path in args.corpora for review in read_reviews(path)]
    unique = list(dict.fromkeys(everything))
    documents = without_evaluated(unique)
    kept = make_text(documents, args.megabytes)
    write_documents(args.out, kept)
    print(f"{len(unique) - len(documents)} of {len(unique):,} share words with dev or test")
    print(f"{args.out}: {len(kept):,} reviews, {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_script(main)
