import pytest

from leanbert.errors import UserError
from leanbert.units import format_duration, format_size, parse_size


@pytest.mark.parametrize(("text", "size"), [("512MiB", 2**29), ("8GiB", 2**33), ("1.5KiB", 1536), ("7B", 7)])
def test_parse_size(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["8GB", "8", "GiB", "-1GiB", "8 gib"])
def test_malformed_sizes_name_the_fix(text):
    with pytest.raises(UserError, match="512MiB or 8GiB"):
        parse_size(text)


def test_format_size():
    assert [format_size(s) for s in (7, 1536, 2**29, 3 * 2**30)] == ["7 B", "1.5 KiB", "512.0 MiB", "3.0 GiB"]


def test_format_duration():
    assert [format_duration(s) for s in (45, 200, 7500)] == ["45 s", "3 min 20 s", "2 h 5 min"]
