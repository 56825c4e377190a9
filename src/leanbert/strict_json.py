"""JSON as the standard has it, which knows no NaN and no Infinity (RFC 8259): they become null."""

from __future__ import annotations

import json
import math
from typing import Any


def dumps(value: object, **options: Any) -> str:
    """Return `json.dumps(value, **options)`, with null for each number that is not finite."""
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value
