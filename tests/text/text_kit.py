"""Random documents for the tests of plain text."""

import random

SHARES = (0.7, 0.15, 0.15)


def words(n: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(("a", "bc", "dé", "ghij", "\nk", "l  m")) for _ in range(n)).strip()


def write_documents(path, documents) -> list:
    path.write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    return [path]
