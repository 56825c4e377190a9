"""JSON as the standard has it, which knows no NaN and no Infinity (RFC 8259): they become null."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from leanbert.files import write_text_atomically


def dumps(value: object, **options: Any) -> str:
    """Return `json.dumps(value, **options)`, with null for each number that is not finite."""
    return json.dumps(_finite(value), allow_nan=False, **options)


def write(path: Path, value: object) -> None:
    """Write a value atomically, or through what is no regular file."""
    write_text_atomically(path, dumps(value, indent=2) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value
