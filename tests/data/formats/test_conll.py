import pytest

from leanbert.data.formats.conll import bio_of_brackets, is_columns, read_columns, read_roles, read_sentences
from leanbert.errors import UserError
from leanbert.messages import say_once

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


def test_multi_word_tokens_and_empty_nodes_are_no_words(tmp_path, capsys):
    say_once.cache_clear()
    path = tmp_path / "a.conllu"
    path.write_text("1-2\tdon't\tO\n1\tdo\tO\n2\tnot\tO\n2.1\tempty\tO\n3\tgo\tO\n")
    assert [rows for _, rows in read_columns([str(path)], [1])] == [[("do",), ("not",), ("go",)]]
    assert f"{path}: 2 multi-word tokens and empty nodes left out" in capsys.readouterr().err
    other = path.rename(tmp_path / "a.conll")
    assert [len(rows) for _, rows in read_columns([str(other)], [1])] == [5]


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


def sentences(folder, text):
    """Return number of the first line and rows of each sentence of a file with this text."""
    path = folder / "x.conll"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return [(int(place.rpartition(":")[2]), rows) for place, rows in read_sentences([str(path)])]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a O\n# O\n#5 O\n", [(1, [["a", "O"], ["#", "O"], ["#5", "O"]])]),
        ("# O\na O\n", [(1, [["#", "O"], ["a", "O"]])]),
        ("# # O\n= # O\n", [(1, [["#", "#", "O"], ["=", "#", "O"]])]),
        ("#tag O\n\n# O\n", [(1, [["#tag", "O"]]), (3, [["#", "O"]])]),
        ("# sent_id = 1\n# text = a # b\na\tO\n#\tO\n", [(3, [["a", "O"], ["#", "O"]])]),
        ("# sent_id = 1\na b c d\n", [(2, [["a", "b", "c", "d"]])]),  # as many columns as the words have
        ("# newdoc id = x\n# newpar\n# any words\na\tO\n", [(4, [["a", "O"]])]),
        ("# id 72d1-aa\tdomain=en\na _ _ O\n", [(2, [["a", "_", "_", "O"]])]),
        ("#\thttps://example.org/ [2010]\n1\ta\tO\tO\n", [(2, [["1", "a", "O", "O"]])]),
        ("# sent_id = 1\n\na O\n", [(3, [["a", "O"]])]),
        ("#begin document (x); part 000\na O\n#end document\nb O\n", [(2, [["a", "O"]]), (4, [["b", "O"]])]),
        ("-DOCSTART- -X- -X- O\n\na x y O\n", [(3, [["a", "x", "y", "O"]])]),
        ("-DOCSTART-\na O\n-DOCSTART-\tO\nb O\n", [(2, [["a", "O"]]), (4, [["b", "O"]])]),
        ("10 000\tO\nkg\tO\n", [(1, [["10 000", "O"], ["kg", "O"]])]),
        ("10\u00a0000 O\nkg\u3000 O\n", [(1, [["10\u00a0000", "O"], ["kg\u3000", "O"]])]),
        ("a\t\tO\nb \t x\tO\n", [(1, [["a", "", "O"], ["b", "x", "O"]])]),
        ("a   O\n b O \n", [(1, [["a", "O"], ["b", "O"]])]),
        ("a O\r\nb O\r\n\r\nc O", [(1, [["a", "O"], ["b", "O"]]), (4, [["c", "O"]])]),
        ("a O\rb O\r\rc O\r", [(1, [["a", "O"], ["b", "O"]]), (4, [["c", "O"]])]),
        ("\ufeffa O\n \t \n\nb O\n", [(1, [["a", "O"]]), (4, [["b", "O"]])]),
        ("a\u2028\x85b O\n", [(1, [["a\u2028\x85b", "O"]])]),
        ("\n\n", []),
    ],
)
def test_words_comments_and_columns_are_told_apart(tmp_path, text, expected):
    assert sentences(tmp_path, text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a O\n\nb O\nc O O\n", "4: 3 columns after 2. Mend the line"),
        ("a\tO\nb O\n", None),  # two columns either way
        ("a\tO\nbO\n", "2: 1 columns after 2. Mend the line"),
        ("a\tO\n# a comment in a sentence\n", "2: 6 columns after 2. Mend the line"),
        ("# a comment\na O\n", "2: 2 columns after 3. Mend the line, or write the comment before it as # key = value"),
    ],
)
def test_a_line_with_other_columns_is_named(tmp_path, text, message):
    if message is None:
        assert len(sentences(tmp_path, text)) == 1
        return
    with pytest.raises(UserError) as raised:
        sentences(tmp_path, text)
    assert str(raised.value) == f"{tmp_path}/x.conll:{message}"


def test_a_word_that_is_missing_is_named(tmp_path):
    path = tmp_path / "a.conll"
    path.write_text("a\tO\n\tO\n")
    with pytest.raises(UserError, match=r"a\.conll:1: word 2 of the sentence, or its tag, is empty"):
        list(read_columns([str(path)], (0, -1)))


def test_roles_of_words_with_a_pound_sign(tmp_path):
    path = tmp_path / "c05.conll"
    path.write_text("It PRP - (A0*)\ncosts VBZ cost (V*)\n# # - (A1*\n5 CD - *)\n")
    ((_, words, labels),) = read_roles([str(path)], word=0, first=3, last=True)
    assert (words, labels) == (["It", "costs", "#", "5"], ["B-A0", "B-V", "B-A1", "I-A1"])


def test_names_of_column_files():
    names = "a.conll a.conll.gz aa_0001.v4_gold_conll aa.gold_conll x_auto_conll eng.train eng.testa a.conllu b.iob2"
    assert all(map(is_columns, names.split()))
    assert not any(map(is_columns, ("a.jsonl", "a.txt", "a.csv", "conll", "train")))


def test_sentences_without_a_predicate_are_counted(tmp_path, capsys):
    path = tmp_path / "a.conll"
    path.write_text("Yes UH -\n\nGo VB go (V*)\n\nNo UH -\n")
    assert len(list(read_roles([str(path)], word=0, first=3, last=True))) == 1
    assert capsys.readouterr().err == "data.role_columns: 2 sentences have no predicate, and are left out\n"
