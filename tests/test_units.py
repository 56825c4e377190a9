from leanbert.units import format_duration, format_size


def test_format_size():
    assert [format_size(s) for s in (7, 1536, 2**29, 3 * 2**30)] == ["7 B", "1.5 KiB", "512.0 MiB", "3.0 GiB"]


def test_format_duration():
    assert [format_duration(s) for s in (45, 200, 7500)] == ["45 s", "3 min 20 s", "2 h 5 min"]
