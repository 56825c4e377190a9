import json
import math

from leanbert import strict_json


def test_numbers_that_json_does_not_have_are_null():
    value = {"loss": math.nan, "peaks": [1.5, math.inf, (-math.inf, 2)], "ü": {"name": "x", "none": None, "yes": True}}
    text = strict_json.dumps(value, ensure_ascii=False)
    assert text == '{"loss": null, "peaks": [1.5, null, [null, 2]], "ü": {"name": "x", "none": null, "yes": true}}'
    assert strict_json.dumps(3, indent=2) == json.dumps(3)


def test_a_file_of_it_ends_with_a_line(tmp_path):
    strict_json.write(tmp_path / "a.json", {"loss": math.inf})
    assert (tmp_path / "a.json").read_text() == '{\n  "loss": null\n}\n'
