"""The text that the demo model is pre-trained on, made from a folder of corpora.

    .venv/bin/python -m experiments.corpus CORPORA OUTPUT
    .venv/bin/python -m experiments.corpus CORPORA OUTPUT --repeat tinystories=1 books_general=0.5
    .venv/bin/python -m experiments.corpus CORPORA OUTPUT --easiest --repeat books_general=0.1

CORPORA has a `NAME.txt.xz` for each source: UTF-8, documents between lines `<|endoftext|>`.

* Long documents are cut at line ends into sections of 6,000 characters or a little more.
* A section with a word of `offensive-words.sha256` is left out, so that a word costs a section and
  not a book.
* Of each source 3 % of the documents are held out and 1 % validate. A hash of the text chooses
  them, so another mixture holds out the same ones. Both are cut into passages of about 800
  characters, as `experiments.bits_per_byte` reads no more.
* A section that shares 20 runs of twelve words with them is not trained on: some tales are in two
  sources.
* A fraction of a source is chosen by hash. With `--easiest` it is the sections that have the fewest
  rare words: those that are not among the 8,000 most frequent ones of all sources. The same share
  of the validation passages is taken then, those with the fewest rare words too.

OUTPUT gets `train.txt`, which ends with the validation passages; `held-out-NAME.txt` for each
source; and `sources.txt`, all sections once, trained on or not, for `experiments.written`. What
went where is printed, and so is the `--split` of `train.txt` for `--option pretrain`.
"""

import hashlib
import lzma
import math
import random
import re
from argparse import RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from minllama.common.errors import InputError, missing_file
from minllama.common.files import atomic_write
from minllama.common.program import ArgumentParser, run_script
from minllama.text.documents import DOCUMENT_SEPARATOR

T = TypeVar("T")

REPEAT = {  # how often the text has each source
    "tinystories": 4.0,
    "fables_tinyfabulist": 2.0,
    "storybooks_asp_pb": 3.0,
    "fairytaleqa": 2.0,
    "andersen_tales": 2.0,
    "books_children": 2.0,
    "books_general": 1.0,
    "cornell_polarity2": 2.0,
}
HELD_OUT, VALIDATION = 0.03, 0.01  # shares of a source's documents
SECTION, PASSAGE = 6000, 700  # characters, reached at the end of a line
MAX_PASSAGES = 200  # held out of one source
RUN, MAX_RUNS = 12, 20  # words in a run; as many shared runs make a copy
N_FREQUENT = 8000  # words that are not rare
OFFENSIVE = Path(__file__).parent / "offensive-words.sha256"


@dataclass
class Source:
    """What becomes of one source's documents.

    Attributes:
        train, validation, held_out: sections to learn from, and passages of the other two.
        offensive, copies: sections that were left out.
        n_documents: before anything was done.
    """

    train: list[str] = field(default_factory=list)
    validation: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    offensive: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)
    n_documents: int = 0


def read_documents(path: Path) -> list[str]:
    """The documents of a text, xz-compressed if its name ends in .xz.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: it is not UTF-8, or not xz-compressed.
    """
    if not path.is_file():
        raise missing_file(path)
    try:
        opened = lzma.open if path.suffix == ".xz" else open
        with opened(path, "rt", encoding="utf-8") as file:
            text = file.read()
    except (lzma.LZMAError, EOFError, UnicodeDecodeError) as error:
        kind = "an xz-compressed" if path.suffix == ".xz" else "a"
        raise InputError(f"{path}: not {kind} UTF-8 text; fetch it anew") from error
    documents = (document.strip() for document in text.split(DOCUMENT_SEPARATOR))
    return [document for document in documents if document]


def place_of(text: str) -> float:
    """A number from 0 up to 1 that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


def cut(document: str, size: int) -> list[str]:
    """Cut a text at line ends into parts of at least `size` characters, the last one apart."""
    parts, lines, length = [], [], 0
    for line in document.split("\n"):
        lines.append(line)
        length += len(line) + 1
        if length >= size:
            parts.append("\n".join(lines).strip())
            lines, length = [], 0
    parts.append("\n".join(lines).strip())
    return [part for part in parts if part]


def words_of(text: str) -> list[str]:
    """The words in lower case; apostrophes and hyphens part them."""
    return re.findall(r"[a-z]+", text.lower())


class OffensiveWords:
    """Profanity and slurs, kept as digests so that nobody has to read them.

    The file has the first 16 hexadecimal digits of the SHA-256 of each word in lower case. The
    words are those that two of three lists have, or that cuss rates as likely profane and that
    these corpora use so: cuss 2.2.0 (MIT), naughty-words 1.2.0 (CC-BY-4.0) and better-profanity
    0.7.0 (MIT). Words whose usual sense in a story is another one are not listed.
    """

    def __init__(self, path: Path = OFFENSIVE):
        self.digests = frozenset(path.read_text().split())
        self.known: dict[str, bool] = {}

    def __contains__(self, word: str) -> bool:
        if word not in self.known:
            digest = hashlib.sha256(word.encode()).hexdigest()[:16]
            self.known[word] = digest in self.digests
        return self.known[word]

    def among(self, words: Iterable[str]) -> list[str]:
        """Those of some words, in lower case, that are listed."""
        return [word for word in words if word in self]


def runs_of(words: Sequence[str], length: int = RUN) -> Iterator[int]:
    """A hash of each run of so many words."""
    return (hash(tuple(words[i : i + length])) for i in range(len(words) - length + 1))


def divide(documents: Sequence[str], offensive: OffensiveWords) -> Source:
    """Cut the documents of a source and say what each part is for."""
    source = Source(n_documents=len(documents))
    for document in documents:
        place = place_of(document)
        for section in cut(document, SECTION):
            if offensive.among(words_of(section)):
                source.offensive.append(section)
            elif place < HELD_OUT:
                source.held_out += cut(section, PASSAGE)
            elif place < HELD_OUT + VALIDATION:
                source.validation += cut(section, PASSAGE)
            else:
                source.train.append(section)
    return source


def take_out_copies(sources: Iterable[Source]) -> None:
    """Move what repeats a held-out or validation passage of any source from `train` to `copies`."""
    sources = list(sources)
    unseen = {
        run
        for source in sources
        for passage in source.held_out + source.validation
        for run in runs_of(words_of(passage))
    }
    for source in sources:
        kept = []
        for section in source.train:
            is_copy = sum(run in unseen for run in runs_of(words_of(section))) >= MAX_RUNS
            (source.copies if is_copy else kept).append(section)
        source.train = kept


def new_share(passages: Iterable[str], known: frozenset[str]) -> float:
    """The share of the words of some passages that are not known."""
    words = [word for passage in passages for word in words_of(passage)]
    return sum(word not in known for word in words) / max(len(words), 1)


def repeated(sections: Sequence[str], times: float, first: bool = False) -> list[str]:
    """Every section as often as asked for; a fraction is a share of them, by hash or the first."""
    places = [i / len(sections) if first else place_of(s) for i, s in enumerate(sections)]
    return [
        section
        for section, place in zip(sections, places, strict=True)
        for _ in range(int(times) + (place < times % 1))
    ]


def easiest_first(sources: Iterable[Source]) -> None:
    """Sort what is trained on and what validates by its share of rare words, in each source."""
    sources = list(sources)
    counts = Counter(
        word for source in sources for section in source.train for word in words_of(section)
    )
    frequent = {word for word, _ in counts.most_common(N_FREQUENT)}

    def rare_share(section: str) -> float:
        words = words_of(section)
        return sum(word not in frequent for word in words) / len(words) if words else 1.0

    for source in sources:
        source.train.sort(key=rare_share)
        source.validation.sort(key=rare_share)


def evenly(items: Sequence[T], n: int) -> list[T]:
    """`n` of the items, evenly spaced, or all."""
    return [items[i * len(items) // n] for i in range(n)] if len(items) > n else list(items)


def joined(parts: Sequence[str]) -> str:
    return "".join(f"{part}\n{DOCUMENT_SEPARATOR}\n" for part in parts)


def shares(train: Sequence[str], validation: Sequence[str]) -> tuple[float, float]:
    """The first two of `--split`, so that training ends where validation begins."""
    sizes = [sum(len(part.encode()) for part in parts) for parts in (train, validation)]
    whole = sum(sizes) or 1
    # `split_chunks` looks where a document begins, so the middle of the last one is a safe end.
    end = sizes[0] - (len(train[-1].encode()) // 2 if train else 0)
    return round(end / whole, 6), round(1 - end / whole, 6)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("corpora", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "--repeat",
        nargs="+",
        default=[],
        action="extend",
        metavar="NAME=TIMES",
        help="another mixture; of a source with 0 nothing is trained on",
    )
    parser.add_argument(
        "--easiest", action="store_true", help="fractions are of the sections with few rare words"
    )
    args = parser.parse_args()
    times = REPEAT | dict(map(parse_repeat, args.repeat))
    offensive = OffensiveWords()
    sources = {
        name: divide(read_documents(args.corpora / f"{name}.txt.xz"), offensive) for name in times
    }
    take_out_copies(sources.values())
    if args.easiest:
        easiest_first(sources.values())
    args.output.mkdir(parents=True, exist_ok=True)
    train, validation, everything = [], [], []
    known = frozenset(
        word
        for source in sources.values()
        for section in source.train + source.copies + source.offensive + source.validation
        for word in words_of(section)
    )
    print(
        "source, documents: sections trained on, times; offensive; copies | passages held out, "
        "their words that are nowhere else"
    )
    for name, source in sources.items():
        held_out = evenly(source.held_out, MAX_PASSAGES)
        with atomic_write(args.output / f"held-out-{name}.txt") as file:
            file.write(joined(held_out))
        train += repeated(source.train, times[name], first=args.easiest)
        share = min(times[name], 1) if args.easiest else 1
        validation += evenly(
            source.validation[: math.ceil(share * len(source.validation))], MAX_PASSAGES
        )
        everything += source.train + source.copies + source.offensive
        everything += source.validation + source.held_out
        parts = (source.train, source.offensive, source.copies)
        counts = [f"{len(part):,} ({sum(map(len, part)) / 1e6:.2f} MB)" for part in parts]
        counts[0] += f" x {times[name]:g}"
        new = f"{new_share(held_out, known):.2%}"
        print(f"{name}, {source.n_documents:,}: {'; '.join(counts)} | {len(held_out)}, {new}")
    random.Random(0).shuffle(train)
    random.Random(0).shuffle(validation)
    with atomic_write(args.output / "train.txt") as file:
        file.write(joined(train + validation))
    with atomic_write(args.output / "sources.txt") as file:
        file.write(joined(everything))
    size = sum(map(len, train)) / 1e6
    print(f"train.txt: {len(train):,} sections, {size:.2f} MB; {len(validation)} to validate")
    print("--split {:f} {:f} 0".format(*shares(train, validation)))


def parse_repeat(text: str) -> tuple[str, float]:
    """`NAME=TIMES` as a pair."""
    name, _, times = text.partition("=")
    try:
        if name in REPEAT and 0 <= float(times) < math.inf:
            return name, float(times)
    except ValueError:
        pass
    raise InputError(f"--repeat {text}: write NAME=TIMES, with a name of {', '.join(REPEAT)}")


if __name__ == "__main__":
    run_script(main)
