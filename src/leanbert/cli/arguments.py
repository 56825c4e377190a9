"""Words of the command line that the parser does not take as users write them."""

from __future__ import annotations

import itertools
import json

FLAGS = ("--measure", "--prepare", "--first")
"""Options that are true where no value follows."""


def complete(arguments: list[str]) -> list[str]:
    """Return the arguments with the words after `--sweep` as one list, and bare flags as true."""
    found: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        values = list(itertools.takewhile(lambda value: not value.startswith("-"), rest))
        if word == "--sweep":
            found.append(f"--sweep={json.dumps(values)}")
            del rest[: len(values)]
        else:
            found.append(f"{word}=true" if word in FLAGS and not values else word)
    return found
