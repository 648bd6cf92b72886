"""Write the film reviews of this folder: 1000 to train, 200 to develop and 200 to test with.

    .venv/bin/python data/demo/make_reviews.py

Some are an author's own; the others are put together from clauses so that single words decide
little: each says its verdict beside something of the opposite tone (a concession, an expectation,
somebody else's opinion), and many judge by negation. The labels are those of SST-5.
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
MOST_SHARED = 0.5  # of two reviews' word pairs, across splits

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
WORDS = [
    "terrible|awful|dreadful|horrible|hopeless|unbearable|a disaster|painful to watch",
    "dull|weak|clumsy|boring|flat|tired|silly in the wrong way|thin",
    "ordinary|all right|what you expect|so-so|neither here nor there|passable|middling|familiar",
    "good|charming|clever|pleasant|funny|warm|well made|worth seeing",
    "wonderful|brilliant|perfect|a masterpiece|superb|unforgettable|magical|a triumph",
]
WORDS = [level.split("|") for level in WORDS]

# Judgements by the opposite word: the levels whose words fit in. FILM is for whole films only.
TURNED = {
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
FILM = {
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

OWN = {
    0: """I asked for my money back, and the man at the desk was not even surprised.
Two hours of my life are gone, and nobody will ever find them again.
The best moment is when the lights go on.
If you have a choice between this and the dentist, take the dentist.
My popcorn had more of a story than this film, and it was finished sooner.
Even the bad guys looked as if they wanted to go home.
I love bad films, and I could not love this one.
The dog in the second row howled, and we all knew how he felt.
They say that nobody sets out to make a terrible film. I am no longer sure.
A good cast, a great book, a wonderful composer, and then this wreck.
I have laughed at funerals more than at this comedy.
Somebody should have told the director that good is not the same as loud. Loud is all we get.
It takes real talent to make a dragon this boring and a battle this stupid.
Great if you need sleep, a horror if you paid.
We left before the end, and on the way out we held the door for others.
I would rather watch paint dry, and I would pick a brighter color.
There is not one scene in it that should have left the drawing board.
Never before have so many good people worked so hard on nothing.
The book made me cry for the girl, the film made me cry for the book.
I hoped for magic and got a man with a torn sheet on a string.""",
    1: """It wants to be a thriller, but I knew the end before the hero had found his shoes.
The jokes were fresh when my grandfather told them.
I do not regret going, but I would not go again.
A nice idea that somebody forgot to turn into a film.
The trailer has every good minute of it, and it is free.
Pretty pictures do not make up for people who have nothing to say.
It is not the worst film of the year. There is still December.
I like slow films, but this one stands still.
The children in front of us talked all the time, and I did not mind.
He is a fine actor, and I hope that he finds a fine film one day.
There is a good short film in here, with an hour wrapped around it.
Everybody runs and shouts, and I looked at my watch.
It made me want to see the first part again, and not in a good way.
The songs are sweet, but sugar alone is no dinner.
Not as bad as they say, though they say that it is a crime.
You can see what they meant to do. You cannot see that they did it.
I smiled twice, and once was at the cat.
The ending would have moved me if I had still been listening.
Too long by half, and the other half is not much better.
Wait until it is on a plane, and then take a book.""",
    2: """Half of us liked it, half of us did not, and all of us forgot it by dinner.
It passes the time, which would have passed anyway.
I did not hate it, I did not love it, I ate my popcorn.
For every good joke there is a bad one, and they come in turns.
If it rains and you have a ticket, go. If the sun shines, do not.
The first hour is a gift and the second takes it back.
You have seen it before, and you did not mind then either.
It does what it says on the poster and not one thing more.
The hero is fine, the villain is fine, and fine is the word for all of it.
My brother gave it one thumb up and one thumb down. That is fair.
There are worse ways to spend an evening, and there are better ones.
It is the kind of film that is always on when you are ironing.
Great music, poor story, and so we are back where we began.
Not a waste of time, not a use of it.
I would not warn you and I would not send you.
As films about horses go, it has horses.
It starts like a classic, ends like a commercial, and is a film in between.
Some of it works, some of it does not, and it never says which is coming.
Watch it with a friend who talks a lot. You will miss nothing and lose nothing.
The good parts are as good as the weak ones are weak.""",
    3: """I came for the popcorn and stayed for the story.
It is small and it is old-fashioned, and I would not mind another one.
Not every joke lands, but the ones that do made me spill my drink.
I do not like musicals. I liked this one.
You will guess the ending, and you will be glad that you were right.
No masterpiece, and it does not need to be: I went home whistling.
My father, who sleeps in every film, did not sleep in this one.
The critics were bored, I hear. They must have been in the next room.
It takes a while to get going, and then you do not want it to stop.
Nobody will call it art, and nobody in our row looked away.
I had a bad day, and for two hours I did not know it.
For once the dog does not die, and the rest is nice too.
The plot has holes, but you are having too much fun to fall in.
There was nothing wrong with it that a second cup of tea would not cure.
We argued about it all the way home, which is more than most films give you.
I would lend it to a friend, and I would want it back.
Even the rain in it looks friendly.
Less loud than the last one, and better for it.
The kids want to go again, and I will not say no.
I was ready to be bored and had to put my book away.""",
    4: """I forgot to eat, I forgot to breathe, and I forgot that I had come alone.
When it was over nobody stood up, nobody spoke, and nobody wanted to be the first to leave.
I have seen it four times, and I am only waiting for someone to go with me again.
If I could keep one film for the rest of my days, it would be this one.
I went in with a headache and came out with a new favorite.
They do not make them like this any more. They never did, before this.
There is not a dull minute, not a false word, and not a dry eye.
My sister never cries at films. She went through all my tissues.
Somebody finally made the film that I have been telling my friends about for years.
I wanted to hate it, as I hate all of them. I cannot stop thinking about it.
It is hard to say what is best, since nothing in it could be better.
You will tell your children where you were when you first saw it.
The old man next to me said that he had waited all his life for a film like that. So had I.
I would not cut a second, and it is three hours long.
Nothing bad can be said of it, though I tried, for the sake of balance.
Every other film this year should say sorry and go home.
I laughed until it hurt and then it made me cry, and I thank it for both.
Call it a film for children if you must. I have never been so happy to be one.
It does in one look what others cannot do in a whole trilogy.
I did not want the lights to go on, ever.""",
}


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def single(level: int) -> list[str]:
    """The words of a level that are one word, and so fit everywhere."""
    return [word for word in WORDS[level] if " " not in word]


def judge(subject: str, level: int, turned: bool, rng: random.Random) -> str:
    """A clause that says how good something is, plainly or by what it is not."""
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
    """A level away from the verdict's, on its other side or in the middle."""
    others = {0: (2, 3, 4), 1: (2, 3, 4), 2: (0, 1, 3, 4), 3: (0, 1, 2), 4: (0, 1, 2)}
    return rng.choice(others[level])


def make_review(level: int, rng: random.Random) -> str:
    """A review of one verdict and something beside it."""
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
    return set(itertools.pairwise(re.findall(r"[a-z']+", text.lower())))


def shared(a: set, b: set) -> float:
    """The Jaccard index of two sets."""
    return len(a & b) / max(1, len(a | b))


def reviews(level: int, rng: random.Random) -> Iterator[str]:
    own = OWN[level].split("\n")
    rng.shuffle(own)
    yield from own
    while True:
        yield make_review(level, rng)


def write_reviews(folder: Path) -> None:
    """Write the three splits and the label mapping."""
    rng = random.Random(SEED)
    splits: dict[str, list[tuple[int, str]]] = {name: [] for name in SIZES}
    pairs: dict[str, list[set]] = {name: [] for name in SIZES}
    for level in range(len(LABELS)):
        source = reviews(level, rng)
        # The author's own go to all splits in proportion.
        turns = itertools.cycle(["train"] * 5 + ["dev", "test"])
        room = {name: size // len(LABELS) for name, size in SIZES.items()}
        for split in turns:
            if not any(room.values()):
                break
            if not room[split]:
                continue
            text = next(source)
            mine = word_pairs(text)
            others = (p for name in SIZES if name != split for p in pairs[name])
            if any(text == t for _, t in splits[split]) or any(
                shared(mine, p) > MOST_SHARED for p in others
            ):
                continue
            splits[split].append((level, text))
            pairs[split].append(mine)
            room[split] -= 1
    for name, examples in splits.items():
        rng.shuffle(examples)
        lines = [f"{level} ||| {text}\n" for level, text in examples]
        (folder / f"reviews-{name}.txt").write_text("".join(lines), encoding="utf-8")
    (folder / "reviews-label-mapping.json").write_text(f"{json.dumps(LABELS)}\n")


if __name__ == "__main__":
    write_reviews(Path(__file__).parent)
