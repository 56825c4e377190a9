import pytest

from leanbert.compression_report.request import CompressRequest, Limits
from leanbert.errors import UserError


def test_limits_have_units():
    request = CompressRequest(output="x", max_size="5MiB", max_latency="4ms", max_drop="1.5 %")
    assert request.limits() == Limits(5 * 2**20, 0.004, 0.015)
    assert not CompressRequest(output="x").limits().any


@pytest.mark.parametrize(
    ("setting", "text"), [("max_size", "5"), ("max_latency", "4"), ("max_latency", "4s"), ("max_drop", "1")]
)
def test_a_limit_without_its_unit_is_an_error(setting, text):
    with pytest.raises(UserError, match=rf"^{setting}: '{text}' is no s"):
        CompressRequest(output="x", **{setting: text}).limits()


def test_no_time_to_measure_is_an_error():
    with pytest.raises(UserError, match=r"^seconds: 0 is out of range"):
        CompressRequest(output="x", seconds=0).limits()
