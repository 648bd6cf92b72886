"""Write the film reviews of `data/demo`: 1000 for training, 200 each for dev and test.

    .venv/bin/python -m experiments.make_reviews

Those of `own-reviews.txt` were written by hand. The others are put together from clauses so that
single words decide little: each has its verdict beside something of another tone (a concession, an
expectation, somebody else's opinion), and many judge by negation. The labels are those of SST-5.
"""

import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

LABELS = ["awful", "bad", "average", "good", "excellent"]
SIZES = {"train": 1000, "dev": 200, "test": 200}
SEED = 5
DEMO = Path(__file__).resolve().parents[1] / "data/demo"
OWN = DEMO / "own-reviews.txt"
MAX_SHARED = 0.5  # of the word pairs of two reviews in different splits

THINGS = (
    """
story|plot|music|ending|beginning|hero|villain|cast|dialogue|humor|dance in the rain|last scene
first hour|second half|camera work|title song|monster|love story|chase through the harbor|robot
talking dog|trial|wedding|old detective|young queen|storm at sea|race across the desert|ghost
battle on the bridge|little brother|train ride|pirate captain|school play|heist|summer camp
narrator|mystery|duel|desert planet|court jester|lighthouse|birthday party|animation|costume parade
""".replace("\n", "|")
    .strip("|")
    .split("|")
)

# What a thing or a film can be called, from worst to best.
WORDS = [level.split("|") for level in (
    "terrible|awful|dreadful|horrible|hopeless|unbearable|a disaster|painful to watch",
    "dull|weak|clumsy|boring|flat|tired|silly in the wrong way|thin",
    "ordinary|all right|what you expect|so-so|neither here nor there|passable|middling|familiar",
    "good|charming|clever|pleasant|funny|warm|well made|worth seeing",
    "wonderful|brilliant|perfect|a masterpiece|superb|unforgettable|magical|a triumph",
)]  # fmt: skip

# Judgements by another word, and the levels whose words fit in. FILM is for whole films only.
Judgements = dict[int, list[tuple[str, tuple[int, ...]]]]
TURNED: Judgements = {
    0: [
        ("could not be further from {word}", (4,)),
        ("is the very opposite of {word}", (4,)),
        ("is as far from {word} as can be", (3, 4)),
        ("makes the word {word} sound like a joke", (4,)),
        ("is about as {word} as a toothache", (3,)),
    ],
    1: [
        ("is not {word}", (3,)),
        ("is never really {word}", (3,)),
        ("tries to be {word} and does not get there", (3, 4)),
        ("would like to be {word} and is not", (3, 4)),
        ("is hardly {word}", (3, 4)),
        ("is too slow to be {word}", (3,)),
    ],
    2: [
        ("is neither {word} nor {other}", (0, 4)),
        ("is neither {word} nor {other}", (1, 3)),
        ("is {word} for a while and {other} for just as long", (1, 3)),
        ("is half {word} and half {other}", (1, 3)),
        ("is {word} as often as {other}", (1, 3)),
        ("is {word} on one day and {other} on the next", (1, 3)),
    ],
    3: [
        ("is not {word} at all", (1,)),
        ("is never {word}", (1,)),
        ("is anything but {word}", (1,)),
        ("is not nearly as {word} as they say", (1,)),
        ("is far from {word}", (1, 0)),
        ("sounds {word} and turns out not to be", (1,)),
        ("refuses to be {word}", (1,)),
    ],
    4: [
        ("could not be less {word}", (1, 0)),
        ("is a world away from being {word}", (0, 1)),
        ("is the very opposite of {word}", (0, 1)),
    ],
}
FILM: Judgements = {
    0: [("is {word} only if you have never been in a cinema", (4,))],
    1: [
        ("is less {word} than it thinks", (3,)),
        ("is called {word} by everybody, and I cannot see why", (3, 4)),
    ],
    2: [("is not {word}, but not {other} either", (1, 3))],
    3: [("does not have one {word} minute", (1,))],
    4: [
        ("makes you forget that films were ever {word}", (1, 0)),
        ("does not have one {word} second, and I would not change a frame", (1,)),
        ("is so far above {word} that I went again the next day", (2,)),
    ],
}

PLAIN = {
    0: ["is {word}", "is {word} from start to end", "is simply {word}", "is {word} in every way"],
    1: ["is {word}", "is rather {word}", "stays {word}", "is {word} most of the time",
        "is a bit too {word}"],
    2: ["is {word}", "is just {word}", "stays {word}"],
    3: ["is {word}", "is quite {word}", "turns out to be {word}", "is {word} most of the time"],
    4: ["is {word}", "is simply {word}", "is {word} from start to end", "is {word} in every way"],
}  # fmt: skip

FILMS = ["the film", "the movie", "the whole film", "this movie", "the picture", "this one"]
FILMS += ["the whole thing"]
PEOPLE = (
    """
my sister|my brother|a friend|my uncle|my neighbor|the man beside me|our teacher|my grandmother
the girl at the door|my cousin|my best friend|our mother|the old man behind us
""".replace("\n", "|")
    .strip("|")
    .split("|")
)
MEDIA = ["the paper", "the poster", "the radio", "half the internet", "everyone at school"]

# How something of another tone stands beside the verdict.
FRAMES = [
    "{Other}, but {verdict}.",
    "{Verdict}, even though {other}.",
    "Although {other}, {verdict}.",
    "{Other}. Still, {verdict}.",
    "{Verdict}. It does not matter that {other}.",
    "{Other}, yet {verdict}.",
    "Yes, {other}. That changes nothing: {verdict}.",
    "{Verdict}, and the fact that {other} does not change that.",
    "You may hear that {other}. Do not let that fool you: {verdict}.",
    "{Other}; all the same, {verdict}.",
    "I know that {other}. In spite of that, {verdict}.",
    "For all that {other}, {verdict}.",
]
HEARSAY = [
    "{Anyone} called it {word}. I do not agree: {verdict}.",
    "{Anyone} said it was {word}, but {verdict}.",
    "I expected something {word}. Instead, {verdict}.",
    "Do not believe {person}, who found it {word}: {verdict}.",
    "I was told it would be {word}. It is not: {verdict}.",
    "{Verdict}, whatever {anyone} may say about {word} films.",
    "After ten minutes I thought it was {word}. I was wrong: {verdict}.",
    "{Person} wanted to see something {word}. Well, {verdict}.",
]
WITH_ANOTHER = [
    "{Verdict}. {Second}.",
    "{Verdict}, and {second}.",
    "{Second}. {Verdict}.",
    "{Verdict}; {second}.",
]


def capital(text: str) -> str:
    """Capitalize the first letter only."""
    return text[:1].upper() + text[1:]


def single(level: int) -> list[str]:
    """The words of a level that fit everywhere, because they are a single one."""
    return [word for word in WORDS[level] if " " not in word]


def judge(subject: str, level: int, turned: bool, rng: random.Random) -> str:
    """A clause that judges something: plainly, or turned, by another level's word."""
    if not turned:
        template = rng.choice(PLAIN[level])
        words = WORDS[level] if template == "is {word}" else single(level)
        return f"{subject} {template.format(word=rng.choice(words))}"
    table = FILM if subject in FILMS and rng.random() < 0.15 else TURNED
    template, levels = rng.choice(table[level])
    if level == 2 and len(levels) == 2:
        low, high = rng.sample(levels, 2)
        clause = template.format(word=rng.choice(single(low)), other=rng.choice(single(high)))
    else:
        clause = template.format(word=rng.choice(single(rng.choice(levels))))
    return f"{subject} {clause}"


def other_tone(level: int, rng: random.Random) -> int:
    """Draw a level on the other side of the verdict's, or in the middle."""
    others = {0: (2, 3, 4), 1: (2, 3, 4), 2: (0, 1, 3, 4), 3: (0, 1, 2), 4: (0, 1, 2)}
    return rng.choice(others[level])


def make_review(level: int, rng: random.Random) -> str:
    """Draw a review: a verdict, and something beside it."""
    parts = {"verdict": judge(rng.choice(FILMS), level, rng.random() < 0.7, rng)}
    thing = f"the {rng.choice(THINGS)}"
    kind = rng.random()
    if kind < 0.6:
        parts["other"] = judge(thing, other_tone(level, rng), rng.random() < 0.7, rng)
        template = rng.choice(FRAMES)
    elif kind < 0.9:
        parts["person"], parts["anyone"] = rng.choice(PEOPLE), rng.choice(PEOPLE + MEDIA)
        parts["word"] = rng.choice(single(other_tone(level, rng)))
        template = rng.choice(HEARSAY)
    else:
        parts["second"] = judge(thing, level, rng.random() < 0.5, rng)
        template = rng.choice(WITH_ANOTHER)
    return template.format(**parts, **{capital(name): capital(p) for name, p in parts.items()})


def word_pairs(text: str) -> set[tuple[str, str]]:
    """All pairs of adjacent words."""
    return set(itertools.pairwise(re.findall(r"[a-z']+", text.lower())))


def shared(a: set, b: set) -> float:
    """The Jaccard index of two sets."""
    return len(a & b) / max(1, len(a | b))


def reviews(level: int, rng: random.Random) -> Iterator[str]:
    """The reviews of a level, those written by hand first, without end."""
    own = [line.split(" ||| ") for line in OWN.read_text(encoding="utf-8").splitlines()]
    texts = [text for label, text in own if int(label) == level]
    rng.shuffle(texts)
    yield from texts
    while True:
        yield make_review(level, rng)


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
            others = [p for name in SIZES if name != split for p in pairs[name]]
            if (level, text) in splits[split] or any(shared(mine, p) > MAX_SHARED for p in others):
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
        lines = [f"{level} ||| {text}\n" for level, text in examples]
        (folder / f"reviews-{split}.txt").write_text("".join(lines), encoding="utf-8")
    (folder / "reviews-label-mapping.json").write_text(f"{json.dumps(LABELS)}\n")


if __name__ == "__main__":
    write_reviews(DEMO)
