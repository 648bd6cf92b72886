"""The demo model's pre-training text, made from a folder of corpora.

    .venv/bin/python -m experiments.corpus CORPORA OUTPUT
    .venv/bin/python -m experiments.corpus CORPORA OUTPUT --repeat tinystories=1 books_general=0.5
    .venv/bin/python -m experiments.corpus CORPORA OUTPUT --easiest --repeat books_general=0.1

CORPORA has a `NAME.txt.xz` for each source: UTF-8, documents between lines `<|endoftext|>`.

* Long documents are cut at line ends into sections of 6,000 characters or a little more.
* Sections with a word of `offensive-words.sha256` are left out.
* Of each source 3 % of the documents are held out and 1 % validate. A hash of the text chooses
  them, so that another mixture holds out the same ones. Both are cut into passages of about 800
  characters, as `experiments.bits_per_byte` reads no more.
* Sections that share 20 runs of twelve words with them are left out: some tales are in two sources.
* A fraction of a source is chosen by hash. With `--easiest` it is the sections with the fewest rare
  words: those that are not among the 8,000 most frequent ones of all sources. The same share of the
  validation passages is taken then, in the same way.

OUTPUT gets `train.txt`, which ends with the validation passages; `held-out-NAME.txt` for each
source; and `sources.txt`, all sections once, trained on or not, for `experiments.written`. It
prints the number of sections by use, and the `--split` of `train.txt` for `--option pretrain`.
"""

import functools
import hashlib
import lzma
import math
import random
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from minllama.common.errors import InputError, missing_file
from minllama.common.files import atomic_write
from minllama.common.program import run_script, script_parser
from minllama.text.documents import DOCUMENT_SEPARATOR

T = TypeVar("T")

REPEAT = {  # copies of each source in the text
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
    """The sections of one source by use; those of validation and held_out are passages.

    Attributes:
        offensive, copies: sections that are left out.
    """

    n_documents: int
    train: list[str] = field(default_factory=list)
    validation: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    offensive: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)


def read_documents(path: Path) -> list[str]:
    """The documents of a text, xz-compressed if its name ends in .xz, or an error of the user."""
    if not path.is_file():
        raise missing_file(path)
    try:
        opened = lzma.open if path.suffix == ".xz" else open
        with opened(path, "rt", encoding="utf-8") as file:
            text = file.read()
    except (lzma.LZMAError, EOFError, UnicodeDecodeError) as error:
        kind = "an xz-compressed" if path.suffix == ".xz" else "a"
        raise InputError(f"{path}: not {kind} UTF-8 text; download it again") from error
    documents = [document.strip() for document in text.split(DOCUMENT_SEPARATOR)]
    if not any(documents):
        raise InputError(f"{path}: no text in it; name a file that has some")
    return [document for document in documents if document]


def write_documents(path: Path, documents: Iterable[str]) -> None:
    with atomic_write(path) as file:
        file.writelines(f"{document}\n{DOCUMENT_SEPARATOR}\n" for document in documents)


def size_of(texts: Sequence[str]) -> str:
    return f"{len(texts):,} ({sum(map(len, texts)) / 1e6:.2f} MB)"


def place_of(text: str) -> float:
    """A number from 0 up to 1 that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


def cut(document: str, size: int) -> list[str]:
    """Cut a text at line ends into pieces of `size` characters or more; the last may have fewer."""
    pieces, lines, length = [], [], 0
    for line in document.split("\n"):
        lines.append(line)
        length += len(line) + 1
        if length >= size:
            pieces.append("\n".join(lines).strip())
            lines, length = [], 0
    pieces.append("\n".join(lines).strip())
    return [piece for piece in pieces if piece]


def evenly(items: Sequence[T], n: int) -> list[T]:
    """`n` of the items, evenly spaced, or all."""
    return [items[i * len(items) // n] for i in range(n)] if len(items) > n else list(items)


def words_of(text: str) -> list[str]:
    """The words in lower case, without apostrophes and hyphens."""
    return re.findall(r"[a-z]+", text.lower())


def runs_of(words: Sequence[str], length: int = RUN) -> Iterator[int]:
    """A hash of each run of so many words."""
    return (hash(tuple(words[i : i + length])) for i in range(len(words) - length + 1))


def unknown_share(text: str, known: Collection[str]) -> float:
    """The share of words that are not known; 1 of a text without words."""
    words = words_of(text)
    return sum(word not in known for word in words) / len(words) if words else 1.0


@functools.cache
def offensive_digests() -> frozenset[str]:
    """The profanity and slurs that are left out, as digests so that nobody has to read them.

    The file has the first 16 hexadecimal digits of each word's SHA-256. The words are in two of
    three lists, or cuss rates them as likely profane and these corpora use them so: cuss 2.2.0
    (MIT), naughty-words 1.2.0 (CC-BY-4.0), better-profanity 0.7.0 (MIT). Words with another usual
    sense in a story are not listed.
    """
    return frozenset(OFFENSIVE.read_text().split())


def has_offensive_word(text: str) -> bool:
    digests = (hashlib.sha256(word.encode()).hexdigest()[:16] for word in set(words_of(text)))
    return not offensive_digests().isdisjoint(digests)


def divide(documents: Sequence[str]) -> Source:
    """Cut the documents of a source, and decide the use of each section."""
    source = Source(len(documents))
    for document in documents:
        place = place_of(document)
        for section in cut(document, SECTION):
            if has_offensive_word(section):
                source.offensive.append(section)
            elif place < HELD_OUT:
                source.held_out += cut(section, PASSAGE)
            elif place < HELD_OUT + VALIDATION:
                source.validation += cut(section, PASSAGE)
            else:
                source.train.append(section)
    return source


def take_out_copies(sources: Collection[Source]) -> None:
    """Move copies of held-out and validation passages of any source from `train` to `copies`."""
    unseen: set[int] = set()
    for source in sources:
        for passage in source.held_out + source.validation:
            unseen.update(runs_of(words_of(passage)))
    for source in sources:
        kept: list[str] = []
        for section in source.train:
            is_copy = sum(run in unseen for run in runs_of(words_of(section))) >= MAX_RUNS
            (source.copies if is_copy else kept).append(section)
        source.train = kept


def easiest_first(sources: Collection[Source]) -> None:
    """Sort `train` and `validation` of each source by their share of rare words."""
    counts: Counter[str] = Counter()
    for source in sources:
        for section in source.train:
            counts.update(words_of(section))
    frequent = {word for word, _ in counts.most_common(N_FREQUENT)}

    rare_share = functools.partial(unknown_share, known=frequent)
    for source in sources:
        source.train.sort(key=rare_share)
        source.validation.sort(key=rare_share)


def repeated(sections: Sequence[str], times: float, first: bool = False) -> list[str]:
    """Every section as often as asked for; a fraction is a share of them, by hash or the first."""
    places = [i / len(sections) if first else place_of(s) for i, s in enumerate(sections)]
    copies: list[str] = []
    for section, place in zip(sections, places, strict=True):
        copies += [section] * (int(times) + (1 if place < times % 1 else 0))
    return copies


def shares(train: Sequence[str], validation: Sequence[str]) -> tuple[float, float]:
    """The first two of `--split`, so that training ends where validation begins."""
    sizes = [sum(len(text.encode()) for text in texts) for texts in (train, validation)]
    whole = sum(sizes) or 1
    # A split ends where a document begins, so the middle of the last one is a safe end.
    end = sizes[0] - (len(train[-1].encode()) // 2 if train else 0)
    return round(end / whole, 6), round(1 - end / whole, 6)


def make_corpus(corpora: Path, output: Path, times: dict[str, float], easiest: bool) -> None:
    """Write the files and print the counts; `times` has the copies of each source."""
    sources = {name: divide(read_documents(corpora / f"{name}.txt.xz")) for name in times}
    take_out_copies(sources.values())
    if easiest:
        easiest_first(sources.values())
    output.mkdir(parents=True, exist_ok=True)
    not_held_out: list[str] = []
    for s in sources.values():
        not_held_out += s.train + s.copies + s.offensive + s.validation
    known = {word for section in not_held_out for word in words_of(section)}
    print(
        "source, documents: sections trained on, times; offensive; copies | passages held out, "
        "their words that are nowhere else"
    )
    train, validation = [], []
    for name, s in sources.items():
        held_out = evenly(s.held_out, MAX_PASSAGES)
        write_documents(output / f"held-out-{name}.txt", held_out)
        train += repeated(s.train, times[name], first=easiest)
        share = min(times[name], 1) if easiest else 1
        validation += evenly(s.validation[: math.ceil(share * len(s.validation))], MAX_PASSAGES)
        counts = [size_of(texts) for texts in (s.train, s.offensive, s.copies)]
        counts[0] += f" x {times[name]:g}"
        new = unknown_share("\n".join(held_out), known)
        print(f"{name}, {s.n_documents:,}: {'; '.join(counts)} | {len(held_out)}, {new:.2%}")
    random.Random(0).shuffle(train)
    random.Random(0).shuffle(validation)
    write_documents(output / "train.txt", train + validation)
    seen_or_not = not_held_out + [text for s in sources.values() for text in s.held_out]
    write_documents(output / "sources.txt", seen_or_not)
    print(f"train.txt: {size_of(train)} to train on; {len(validation)} to validate")
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


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("corpora", type=Path)
    parser.add_argument("output", type=Path)
    help = "another mixture; 0 leaves a source out"
    parser.add_argument("--repeat", nargs="+", default=[], metavar="NAME=TIMES", help=help)
    help = "fractions are of the sections with few rare words"
    parser.add_argument("--easiest", action="store_true", help=help)
    flags = parser.parse_args()
    times = REPEAT | dict(map(parse_repeat, flags.repeat))
    make_corpus(flags.corpora, flags.output, times, flags.easiest)


if __name__ == "__main__":
    run_script(main)
