"""Write the film reviews of `data/demo`: 1000 for training, 200 each for dev and test.

    .venv/bin/python -m experiments.make_reviews

Those of `own-reviews.txt` were written by hand. The others are put together from the clauses of
`review-clauses.json` so that single words decide little: each has its verdict beside something of
another tone (a concession, an expectation, somebody else's opinion), and many judge by negation.
The labels are those of SST-5, which are called levels here.
"""

import functools
import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minllama.common.program import run_script, script_parser
from minllama.text.labelled import SEPARATOR, read_labelled

LABELS = ["awful", "bad", "average", "good", "excellent"]
SIZES = {"train": 1000, "dev": 200, "test": 200}
SEED = 5
DEMO = Path(__file__).resolve().parents[1] / "data/demo"
MAX_SHARED = 0.5  # of the word pairs of two reviews in different splits
OTHER_LEVELS = {0: (2, 3, 4), 1: (2, 3, 4), 2: (0, 1, 3, 4), 3: (0, 1, 2), 4: (0, 1, 2)}


@functools.cache
def clauses() -> dict[str, Any]:
    """The tables of words and templates.

    `words`, `plain`, `turned` and `film` have an item for each level. With the templates of the
    last two stand the levels whose words they take; those of `film` are for whole films.
    """
    return json.loads((DEMO / "review-clauses.json").read_text(encoding="utf-8"))


def single(level: int) -> list[str]:
    """The words of a level that fit everywhere, because they are a single one."""
    return [word for word in clauses()["words"][level] if " " not in word]


def judge(subject: str, level: int, turned: bool, rng: random.Random) -> str:
    """A clause that judges something: plainly, or turned, by another level's word."""
    tables = clauses()
    if not turned:
        template = rng.choice(tables["plain"][level])
        words = tables["words"][level] if template == "is {word}" else single(level)
        return f"{subject} {template.format(word=rng.choice(words))}"
    is_film = subject in tables["films"] and rng.random() < 0.15
    template, levels = rng.choice(tables["film" if is_film else "turned"][level])
    levels = rng.sample(levels, 2) if level == 2 else [rng.choice(levels)]
    words = [rng.choice(single(each)) for each in levels]
    return f"{subject} {template.format(word=words[0], other=words[-1])}"


def make_review(level: int, rng: random.Random) -> str:
    """Draw a review: a verdict, and something beside it."""
    tables = clauses()
    parts = {"verdict": judge(rng.choice(tables["films"]), level, rng.random() < 0.7, rng)}
    thing = f"the {rng.choice(tables['things'])}"
    kind = rng.random()
    if kind < 0.6:
        other_level = rng.choice(OTHER_LEVELS[level])
        parts["other"] = judge(thing, other_level, rng.random() < 0.7, rng)
        template = rng.choice(tables["frames"])
    elif kind < 0.9:
        parts["person"] = rng.choice(tables["people"])
        parts["anyone"] = rng.choice(tables["people"] + tables["media"])
        parts["word"] = rng.choice(single(rng.choice(OTHER_LEVELS[level])))
        template = rng.choice(tables["hearsay"])
    else:
        parts["second"] = judge(thing, level, rng.random() < 0.5, rng)
        template = rng.choice(tables["with_another"])
    capitals = {name.capitalize(): part[:1].upper() + part[1:] for name, part in parts.items()}
    return template.format(**parts, **capitals)


def reviews(level: int, rng: random.Random) -> Iterator[str]:
    """The reviews of a level, those written by hand first, without end."""
    examples = read_labelled(DEMO / "own-reviews.txt")
    own = [example.sentence for example in examples if example.label == level]
    rng.shuffle(own)
    yield from own
    while True:
        yield make_review(level, rng)


def word_pairs(text: str) -> set[tuple[str, str]]:
    """All pairs of adjacent words."""
    return set(itertools.pairwise(re.findall(r"[a-z']+", text.lower())))


def make_splits() -> dict[str, list[tuple[int, str]]]:
    """Draw `(level, text)` for each split, without near copies in another split."""
    rng = random.Random(SEED)
    splits: dict[str, list[tuple[int, str]]] = {split: [] for split in SIZES}
    pairs: dict[str, list[set]] = {split: [] for split in SIZES}
    for level in range(len(LABELS)):
        source = reviews(level, rng)
        room = {split: size // len(LABELS) for split, size in SIZES.items()}
        # In proportion to the sizes, so that those written by hand go to all splits.
        for split in itertools.cycle(["train"] * 5 + ["dev", "test"]):
            if not any(room.values()):
                break
            if not room[split]:
                continue
            text = next(source)
            mine = word_pairs(text)
            others = [each for name in SIZES if name != split for each in pairs[name]]
            is_copy = any(len(mine & each) > MAX_SHARED * len(mine | each) for each in others)
            if is_copy or (level, text) in splits[split]:
                continue
            splits[split].append((level, text))
            pairs[split].append(mine)
            room[split] -= 1
    for examples in splits.values():
        rng.shuffle(examples)
    return splits


def write_reviews(folder: Path) -> None:
    """Write the splits and the label mapping."""
    for split, examples in make_splits().items():
        lines = [f"{level}{SEPARATOR}{text}\n" for level, text in examples]
        (folder / f"reviews-{split}.txt").write_text("".join(lines), encoding="utf-8")
    (folder / "reviews-label-mapping.json").write_text(f"{json.dumps(LABELS)}\n")


def main() -> None:
    script_parser(__doc__).parse_args()
    write_reviews(DEMO)


if __name__ == "__main__":
    run_script(main)
