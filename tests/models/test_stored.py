from pathlib import Path

import pytest

from leanbert.errors import UserError
from leanbert.models.stored import ALLOWED, ModelMetadata

VALUES = {
    "max_length": 24, "max_target_length": 12, "labels": ["a", "b"], "problem": "multi", "threshold": 0.0,
    "mark": "segments", "find_predicates": False, "decoder_layers": 1, "decoder_start": "shared",
    "target_vocab_size": 70, "copy": False, "texts": 2, "generation": {"beams": 2},
}  # fmt: skip
ODD = {"labels": "ab", "problem": "some", "mark": ["tokens"], "decoder_start": 1, "find_predicates": 1, "copy": "yes"}


def read(**values):
    return ModelMetadata.read("srl", values, Path("a.ckpt"), "Mend it")


def test_what_it_says_is_what_was_read():
    metadata = read(**VALUES, later="unknown here")
    assert metadata == ModelMetadata("srl", **VALUES)
    assert metadata.said() == VALUES
    assert read(labels=None).said() == ModelMetadata("srl").said() == {}


@pytest.mark.parametrize("name", list(ALLOWED))
def test_a_value_that_cannot_be_one_is_named(name):
    value = ODD.get(name, -1)
    with pytest.raises(UserError) as error:
        read(**{name: value})
    assert str(error.value) == f"a.ckpt: leanbert.{name} {value!r} is no such value. Mend it"
