"""A small corpus with something to learn, the same at every call."""

from __future__ import annotations

import random
from pathlib import Path

SUBJECTS = ["cat", "dog", "child", "teacher", "farmer", "bird", "doctor", "king"]
VERBS = ["sat on", "looked at", "ran to", "slept in", "found", "painted", "forgot", "sold"]
OBJECTS = ["house", "garden", "river", "table", "mountain", "letter", "bread", "window"]


def write_corpus(path: Path, documents: int = 400) -> None:
    """Write `documents` documents of 1 to 4 sentences, separated by blank lines."""
    chance = random.Random(0)
    texts = []
    for _ in range(documents):
        sentences = [
            f"The {chance.choice(SUBJECTS)} {chance.choice(VERBS)} the {chance.choice(OBJECTS)}, "
            f"and number {chance.randrange(1000)} was the {chance.choice(SUBJECTS)}."
            for _ in range(chance.randint(1, 4))
        ]
        texts.append("\n".join(sentences))
    path.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
