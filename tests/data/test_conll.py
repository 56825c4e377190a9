import pytest

from leanbert.data.conll import bio_of_brackets, read_columns, read_roles
from leanbert.errors import UserError

FILE = """#begin document
d 0 0 He     PRP x - (A0*) *
d 0 1 said   VBD x - (V*)  *
d 0 2 she    PRP x - (A1*  (A0*)
d 0 3 left   VBD x - *)    (V*)

d 0 0 Go     VB  x - (V*)
"""


def test_each_column_of_roles_is_one_predicate(tmp_path):
    path = tmp_path / "a.conll"
    path.write_text(FILE)
    found = list(read_roles([str(path)], word=3, first=7, last=True))
    assert [labels for _, _, labels in found] == [
        ["B-A0", "B-V", "B-A1", "I-A1"],
        ["O", "O", "B-A0", "B-V"],
        ["B-V"],
    ]
    assert found[0][:2] == (f"{path}:2", ["He", "said", "she", "left"])
    assert found[2][0] == f"{path}:7"
    assert len(list(read_roles([str(path)], word=3, first=7, last=False))) == 1  # the last column is something else


def test_columns_by_number(tmp_path):
    path = tmp_path / "a.conll"
    path.write_text("EU B-ORG\nrejects O\n\nBonn B-LOC\n")
    assert [rows for _, rows in read_columns([str(path)], (0, -1))] == [
        [("EU", "B-ORG"), ("rejects", "O")],
        [("Bonn", "B-LOC")],
    ]
    with pytest.raises(UserError, match=r"a\.conll:1: 2 columns"):
        list(read_columns([str(path)], (0, 5)))
    path.write_text("EU B-ORG\nrejects\n")
    with pytest.raises(UserError, match=r"a\.conll:2: 1 columns after 2"):
        list(read_columns([str(path)], (0, -1)))


@pytest.mark.parametrize("cells", [["(A0*", "(A1*)"], ["*)"], ["(A0*", "*"], ["A0"]])
def test_brackets_that_do_not_match_are_named(cells):
    with pytest.raises(UserError, match="x:1: "):
        bio_of_brackets("x:1", cells)
