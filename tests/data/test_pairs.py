import gzip
import json

import numpy as np
import pytest

from leanbert.data.batches.batch import IGNORED
from leanbert.data.batches.packing import pack_examples
from leanbert.data.pairs import PairData
from leanbert.errors import UserError
from leanbert.models.stored import ModelMetadata

RECORDS = [
    {"source": "a b", "target": "c"},
    {"source": "c d e", "target": "a b"},
    {"source": "e", "target": "d d d d"},
]


def write(path, lines):
    """Lines of text, or of JSON."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts))
    return str(path)


def settings_of(tmp_path, **settings):
    return {"vocab_size": 40, "max_length": 12, "batch_size": 1, "cache_dir": str(tmp_path / "cache"), **settings}


def data_of(tmp_path, records=RECORDS, **settings):
    file = write(tmp_path / "train.jsonl", records)
    return PairData(**settings_of(tmp_path, **{"train_files": file, "val_files": file, **settings}))


def lines_of(tmp_path, sources, targets, **settings):
    """Text files, one or several of each."""
    files = [[some[number] if isinstance(lines, str) else write(tmp_path / f"{number}.{kind}", lines)
              for number, lines in enumerate(some)]
             for kind, some in (("en", sources), ("de", targets))]  # fmt: skip
    return PairData(**settings_of(tmp_path, train_files=files[0], train_target_files=files[1], **settings))


def texts(pairs):
    return [(pair.source, pair.target) for pair in pairs]


def refused(work, message):
    """The error, which is one line and matches."""
    with pytest.raises(UserError, match=message) as caught:
        work()
    assert "\n" not in str(caught.value)


# ---- text files


def test_two_files_are_read_line_by_line(tmp_path):
    (tmp_path / "x.en").write_bytes("\ufeffa b\r\nc\x85d\u2028e\r\nf".encode())  # no line ends but the last
    with gzip.open(tmp_path / "x.de.gz", "wt") as file:
        file.write("A\nB\nC\n")
    files = {f"{part}{kind}_files": str(tmp_path / name) for part in ("train", "val")
             for kind, name in (("", "x.en"), ("_target", "x.de.gz"))}  # fmt: skip
    pairs = list(PairData(**settings_of(tmp_path, **files)).pairs("val"))
    assert texts(pairs) == [("a b", "A"), ("c\x85d\u2028e", "B"), ("f", "C")]
    assert [pair.where for pair in pairs] == [f"{tmp_path / 'x.en'}:{number}" for number in (1, 2, 3)]
    assert [pair.references for pair in pairs] == [["A"], ["B"], ["C"]]


def test_several_files_belong_together_in_the_order_given(tmp_path):
    data = lines_of(tmp_path, [["c"], ["a"], ["b"]], [["C"], ["A"], ["B"]])
    sources, targets = data.hparams["train_files"], data.hparams["train_target_files"]
    shuffled = {"val_files": [sources[number] for number in (2, 0, 1)], "val_target_files": targets}
    data = lines_of(tmp_path, [["c"], ["a"], ["b"]], [["C"], ["A"], ["B"]], **shuffled)
    assert texts(data.pairs("train")) == [("c", "C"), ("a", "A"), ("b", "B")]
    assert texts(data.pairs("val")) == [("b", "C"), ("c", "A"), ("a", "B")]
    data.setup("fit")  # the same files in another order are other pairs in the cache too
    letters = {
        part: [data.tokenizer.decode(ids) for ids in data.caches[part].read("source", [np.arange(3)])[0]]
        for part in ("train", "val")
    }
    assert letters == {"train": ["c", "a", "b"], "val": ["b", "c", "a"]}


@pytest.mark.parametrize(
    ("sources", "targets", "message"),
    [
        ([["a", "b", "c"]], [["A"]], r"^\S+/0\.en:2: the other file \(\S+/0\.de\) has no such line\. Give files"),
        ([["a"], ["b"]], [["A"], ["B", "C"]], r"^\S+/1\.de:2: the other file \(\S+/1\.en\) has no such line\."),
        ([["a"], ["b"]], [["A"]], r"^data\.train_target_files: 1 files for 2 of sources\. Give one for each$"),
        (
            [["a"], "hf:x"],
            [["A"], "hf:y"],
            r"^data\.train_files: hf:x has no lines\. Leave out data\.train_target_files",
        ),
    ],
)
def test_files_that_do_not_fit_together(tmp_path, sources, targets, message):
    refused(lambda: lines_of(tmp_path, sources, targets).setup("fit"), message)


def test_invalid_utf8_and_missing_files(tmp_path):
    data = lines_of(tmp_path, [["a", "b"]], [["A", "B"]])
    (tmp_path / "0.de").write_bytes(b"A\n\xff\n")
    refused(lambda: list(data.pairs("train")), r"^\S+/0\.de:2: not valid UTF-8 \(invalid start byte\)\. Convert")
    (tmp_path / "0.de").unlink()
    refused(lambda: list(data.pairs("train")), r'^data\.train_target_files: no file matches "\S+0\.de"\. Check')
    (tmp_path / "x.jsonl").write_bytes(b'{"source": "\xff"}\n')
    refused(
        lambda: list(PairData(train_files=str(tmp_path / "x.jsonl")).pairs("train")),
        r"^\S+/x\.jsonl:1: not valid UTF-8",
    )


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_targets_without_sources_are_refused(part):
    given = {} if part == "train" else {"train_files": "a.en", "train_target_files": "a.de"}
    message = rf"^data\.{part}_target_files: there are no sources to them\. Set data\.{part}_files too$"
    refused(lambda: PairData(**given, **{f"{part}_target_files": "x.de"}), message)


# ---- records


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv"])
def test_records_have_fields_of_any_name(tmp_path, suffix):
    lines = {
        "jsonl": [{"en": 'say "a", b', "de": "A", "more": 1}, {"de": "B", "en": "c"}],
        "csv": ["en,more,de", '"say ""a"", b",1,A', "c,2,B"],
        "tsv": ["en\tmore\tde", 'say "a", b\t1\tA', "c\t2\tB"],
    }[suffix]
    file = write(tmp_path / f"x.{suffix}", lines)
    data = PairData(train_files=file, val_files=file, source_field="en", target_field="de")
    pairs = list(data.pairs("train"))
    assert texts(pairs) == [('say "a", b', "A"), ("c", "B")]
    first = 1 if suffix == "jsonl" else 2
    assert [pair.where for pair in pairs] == [f"{file}:{first}", f"{file}:{first + 1}"]


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        (
            "x.jsonl",
            [RECORDS[0], {"source": "a"}],
            r'^\S+x\.jsonl:2: no field "target"\. Set data\.target_field; here is',
        ),
        ("x.jsonl", [{"source": 3, "target": "a"}], r'^\S+x\.jsonl:1: no text in field "source" \(int\)\. Set'),
        ("x.jsonl", ["[1]"], r"^\S+x\.jsonl:1: not a JSON object but an array\. Write one"),
        ("x.jsonl", ["1"], r"^\S+x\.jsonl:1: not a JSON object\. Write one object a line$"),
        ("x.tsv", ["source\ttarget", "a"], r"^\S+x\.tsv:2: 1 cells, the header has 2\. Add the missing ones$"),
        ("x.csv", ["source,goal", "a,b"], r"""^\S+x\.csv:1: no field "target"\. .* here is 'source', 'goal'$"""),
        ("x.txt", ["a"], r"^\S+x\.txt: has no fields\. data\.train_files takes \.jsonl \.csv \.tsv, each also with"),
        ("x.en", ["a"], r"^\S+x\.en: has no fields\. .* hf: names; with data\.train_target_files lines of text$"),
        ("x.jsonl", [], r"^data\.train_files: there is no example in it\. Give files with examples$"),
    ],
)
def test_bad_records_name_file_and_line(tmp_path, name, lines, message):
    file = write(tmp_path / name, lines)
    tokenizer = write(tmp_path / "vocab.txt", ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"])
    data = PairData(**settings_of(tmp_path, train_files=file, val_files=file, tokenizer=tokenizer))
    refused(lambda: data.setup("fit"), message)


def test_references_begin_with_the_target_and_are_different(tmp_path):
    records = [
        {"source": "a", "target": "x", "others": ["y", "x", "z", "y"]},
        {"source": "b", "target": "x"},
        {"source": "c", "target": "x", "others": []},
    ]
    data = data_of(tmp_path, records, references_field="others")
    assert [pair.references for pair in data.pairs("val")] == [["x", "y", "z"], ["x"], ["x"]]
    assert [pair.references for pair in data_of(tmp_path, records).pairs("val")] == [["x"]] * 3
    records[1]["others"] = "y"
    data = data_of(tmp_path, records, references_field="others")
    refused(lambda: list(data.pairs("val")), r'^\S+train\.jsonl:2: field "others" is no list of str\.')


def test_references_that_no_evaluation_pair_has_are_refused(tmp_path):
    data = data_of(tmp_path, references_field="others")
    assert len(list(data.pairs("train"))) == 3  # training has no use for them
    refused(lambda: data.setup("fit"), r"^data\.references_field: is others, but the val pairs \(\S+\) have no such")
    data = lines_of(tmp_path, [["a"]], [["b"]], references_field="others")
    refused(lambda: list(data.pairs("val")), r"^data\.references_field: .* are lines of text")


@pytest.mark.parametrize("sample", ["translation", "summarization"])
def test_fields_of_own_files_beside_an_embedded_sample_are_those_that_are_set(tmp_path, sample, monkeypatch):
    embedded = {"translation": {"source": "a", "target": "b"}, "summarization": {"document": "a", "summary": "b"}}
    file = tmp_path / "embedded.jsonl"
    write(file, [embedded[sample]])
    monkeypatch.setattr(
        "leanbert.data.settings.embedded_files", lambda *_: dict.fromkeys(("train", "val", "test"), file)
    )
    own = write(tmp_path / "own.jsonl", [{"en": "c", "de": "d"}])
    data = PairData(sample, test_files=own, source_field="en", target_field="de", cache_dir=str(tmp_path / "c"))
    assert [texts(data.pairs(part)) for part in ("train", "val", "test")] == [[("a", "b")], [("a", "b")], [("c", "d")]]


def test_validation_pairs_are_held_out_by_their_source(tmp_path):
    sources = [f"text {number}" for number in range(200)]
    whole = list(zip(sources, [text.upper() for text in sources], strict=True))
    data = lines_of(tmp_path, [sources], [[text.upper() for text in sources]], val_share=0.2)
    train, val = texts(data.pairs("train")), texts(data.pairs("val"))
    assert (len(train), len(val)) == (158, 42)
    assert sorted(train + val) == sorted(whole)
    records = [{"source": source, "target": "other"} for source in reversed(sources)]
    again = data_of(tmp_path, records, val_files=None, val_share=0.2)  # neither order nor targets matter
    assert [source for source, _ in texts(again.pairs("val"))] == [source for source, _ in reversed(val)]
    with pytest.raises(UserError, match=r"^data\.test_files: not set\. Give the files of test examples$"):
        list(data.pairs("test"))


# ---- lengths


def test_pairs_that_are_too_long_are_refused(tmp_path):
    eight = "a b c d e a b c"
    for side, settings, needed, limit in (
        ("source", {"max_length": 8, "max_target_length": 16}, 10, "max_length"),
        ("target", {"max_length": 8}, 9, "max_length"),  # read up to its last token
        ("target", {"max_length": 16, "max_target_length": 8}, 9, "max_target_length"),
    ):
        data = data_of(tmp_path, [RECORDS[0], {**RECORDS[0], side: eight}], too_long="refuse", **settings)
        refused(
            lambda data=data: data.setup("fit"),
            rf"^\S+/train\.jsonl:2: {needed} tokens, but a row has 8\. Raise data\.{limit}, or truncate",
        )
    fits = [{"source": "a b c d e a b", "target": eight}]
    data_of(tmp_path, fits, too_long="refuse", max_length=9).setup("fit")


def test_pairs_that_are_too_long_are_cut_counted_and_told(tmp_path, capsys):
    records = [
        RECORDS[0],
        {"source": "a b c d e a b", "target": "a b c d e a b c"},  # both sides: one pair
        {"source": "a b c d e a", "target": "e d c b a e d c"},
        {"source": "e", "target": "a b c d e a b"},  # fits
    ]
    data = data_of(tmp_path, records, val_files=write(tmp_path / "val.jsonl", RECORDS), max_length=8)
    data.setup("fit")
    assert data.caches["train"].notes.cut == 2
    assert data.caches["val"].notes.cut == 0
    told = "2 training examples were longer than data.max_length (8 tokens) and were cut"
    assert [line for line in capsys.readouterr().err.splitlines() if "were cut" in line] == [told]
    begin, end = data.tokenizer.cls_id, data.tokenizer.sep_id
    ids = dict(zip("abcde", (piece[0] for piece in data.tokenizer.encode_words(list("abcde"))), strict=True))
    assert data.caches["train"].read("source", [np.asarray([1, 2])])[0][0].tolist() == [
        begin, *(ids[letter] for letter in "abcdea"), end]  # fmt: skip
    assert data.caches["train"].read("target", [np.asarray([1, 2, 3])])[0][1].tolist() == [
        begin, *(ids[letter] for letter in "edcbaed"), end]  # fmt: skip
    data_of(tmp_path, records, max_length=16, max_target_length=8).setup("fit")
    told = "examples were longer than data.max_length (16 tokens) or data.max_target_length (8 tokens) and were cut"
    assert [line for line in capsys.readouterr().err.splitlines() if "were cut" in line] == [
        f"2 training {told}", f"2 validation {told}"]  # fmt: skip


def test_lengths_are_the_models(tmp_path, capsys):
    """A model that says its length and none of targets has one for both; one that says nothing leaves them be."""
    for said, expected in (
        ({}, (12, 9)),
        ({"max_length": 10}, (10, 10)),
        ({"max_length": 10, "max_target_length": 8}, (10, 8)),
        ({"max_length": 12, "max_target_length": 9}, (12, 9)),
    ):
        data = data_of(tmp_path, max_target_length=9)
        data.adopt(ModelMetadata("seq2seq", **said))
        assert data.room == expected
        replaced = capsys.readouterr().err.count("as the model was trained")
        assert replaced == (expected[0] != 12) + (expected[1] != 9)


def test_bad_lengths():
    refused(
        lambda: PairData(max_target_length=7),
        r"^data\.max_target_length: 7 is out of range\. Give a whole number, 8 or more\.$",
    )


# ---- rows


def test_packed_rows_are_exactly_these(tmp_path):
    data = data_of(tmp_path, max_target_length=8)
    data.setup("fit")
    a, b, c, d, e = (piece[0] for piece in data.tokenizer.encode_words(list("abcde")))
    pad, begin, end, none = data.tokenizer.pad_id, data.tokenizer.cls_id, data.tokenizer.sep_id, IGNORED
    rows = data.evaluation_rows("val")
    assert rows.rows == 2  # sources of 4, 5 and 3 tokens fit into 12; targets of 2, 3 and 5 do not into 8
    batch = {name: tensor.tolist() for name, tensor in rows[np.asarray([1, 0])].tensors().items()}
    assert batch == {
        "input_ids": [[begin, e, end] + [pad] * 9, [begin, a, b, end, begin, c, d, e, end] + [pad] * 3],
        "position_ids": [[0, 1, 2] + [0] * 9, [0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 0, 0]],
        "document_ids": [[0] * 3 + [-1] * 9, [0] * 4 + [1] * 5 + [-1] * 3],
        "decoder_input_ids": [[begin, d, d, d, d, pad, pad, pad], [begin, c, begin, a, b, pad, pad, pad]],
        "decoder_position_ids": [[0, 1, 2, 3, 4, 0, 0, 0], [0, 1, 0, 1, 2, 0, 0, 0]],
        "decoder_document_ids": [[0] * 5 + [-1] * 3, [0, 0, 1, 1, 1, -1, -1, -1]],
        "targets": [[d, d, d, d, end, none, none, none], [c, end, a, b, end, none, none, none]],
    }
    blank = data.blank_batch(2)
    assert {name: tensor.shape for name, tensor in blank.tensors().items()} == {
        name: tensor.shape for name, tensor in rows[np.asarray([0, 1])].tensors().items()
    }


def test_training_rows_are_each_seen_once_an_epoch(tmp_path):
    records = [{"source": f"{x} {y}", "target": f"{y} {x} {x}"} for x in "abcde" for y in "abcde"]
    data = data_of(tmp_path, records)
    data.setup("fit")
    rows = data.training_rows()
    epochs = [[tuple(ids) for ids in rows[np.arange(start, start + rows.rows)].inputs.input_ids.tolist()]
              for start in (0, rows.rows)]  # fmt: skip
    assert rows.rows == 9  # of 3 sources each
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]
    assert data.statistics["train"].documents == 25


def test_sources_come_longest_first_with_their_references(tmp_path):
    records = [{"source": "a" * length, "target": str(length), "more": [f"{length}!"]} for length in (2, 5, 3, 4, 1)]
    data = data_of(tmp_path, records, references_field="more")
    data.setup("fit")

    def lengths(*arguments):
        found = []
        for batch, references in data.sources("val", *arguments):
            assert references == [[str(len(text)), f"{len(text)}!"] for text in batch.texts]
            assert len(batch.inputs.input_ids) == len(batch.texts)
            found.append([len(text) for text in batch.texts])
        return found

    assert lengths(2) == [[5, 4], [3, 2], [1]]
    assert lengths(2, 3) == [[5, 3], [2]]  # the first three of the file
    assert lengths(9, 1) == [[2]]
    assert lengths(2, 0) == []


def test_a_mask_token_in_a_source_is_text(tmp_path):
    data = data_of(tmp_path, [{"source": "a [MASK] b", "target": "c"}])
    data.setup("fit")
    ((batch, _),) = data.sources("val", 1)
    assert data.tokenizer.mask_id not in batch.inputs.input_ids[0].tolist()
    assert data.tokenizer.mask_id not in data.caches["val"].read("source", [np.asarray([0])])[0][0].tolist()
    assert batch.inputs.input_ids[0].tolist() == data.caches["val"].read("source", [np.asarray([0])])[0][0].tolist()


def test_rows_are_packed_once_and_again_where_a_setting_of_theirs_changes(tmp_path, monkeypatch):
    packed = []

    def counted(lengths, room, *more):
        packed.append(room)
        return pack_examples(lengths, room, *more)

    monkeypatch.setattr("leanbert.data.module.pack_examples", counted)
    data = data_of(tmp_path)
    data.setup("fit")
    assert packed == [(12, 12)] * 2  # training and validation, for the statistics
    assert (data.training_rows().rows, data.evaluation_rows("val").rows, len(packed)) == (1, 1, 2)
    data.hparams["max_length"] = 8
    assert data.evaluation_rows("val").rows == 2
    data.hparams["max_target_length"] = 16
    data.evaluation_rows("val")
    data.hparams["seed"] = 1  # of training only
    data.evaluation_rows("val")
    data.training_rows()
    assert packed[2:] == [(8, 8), (8, 16), (8, 16)]
