from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from leanbert.data.statistics import count_unknown


@pytest.mark.parametrize(("unk_id", "expected"), [(1, (30, 39)), (None, (0, 9))])
def test_unknown_tokens_are_counted_among_those_of_text(unk_id: int | None, expected: tuple[int, int]) -> None:
    tokenizer: Any = SimpleNamespace(special_ids=[0, 1, 2, 3], unk_id=unk_id)
    assert count_unknown(np.array([100, 30, 7, 7, 4, 5]), tokenizer) == expected
