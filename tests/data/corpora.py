"""Small corpora for the tests, the same in every process."""

from __future__ import annotations

import random
from pathlib import Path

_STORY = """the river runs past mill and market until it meets the sea where sailors mend their nets and children
count white boats while old captains tell long stories about storms that broke masts and hearts"""
_MIXTURE = "Über größere Äpfel freut sich Zoë; élève à l'école, señor Núñez, привет мир, Ελλάδα, naïve café"

ENGLISH = _STORY.split()
MULTILINGUAL = _MIXTURE.split()
CHINESE = "春眠不觉晓处处闻啼鸟夜来风雨声花落知多少床前明月光疑是地上霜举头望明月低头思故乡"


def sentences(words: list[str] | str, documents: int, length: int = 40, seed: int = 0) -> list[str]:
    """Return documents of `length` words each, now and then with a capital, a number or a made-up word."""
    generator = random.Random(seed)
    joint = "" if isinstance(words, str) else " "

    def word() -> str:
        chosen = generator.choice(words)
        chance = generator.random()
        if chance < 0.05:
            return chosen + generator.choice(words)
        return chosen.capitalize() if chance < 0.15 else str(generator.randrange(2000)) if chance < 0.2 else chosen

    return [joint.join(word() for _ in range(length)) + "." for _ in range(documents)]


def write_corpus(path: Path, documents: list[str]) -> Path:
    """Write documents with blank lines between them."""
    path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return path
