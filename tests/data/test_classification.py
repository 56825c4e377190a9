import json

import numpy as np
import pytest
import torch

from leanbert.data.batches.texts import encode_texts
from leanbert.data.classification import ClassificationData
from leanbert.data.tokenizers.tokenizer import TextTokenizer
from leanbert.errors import UserError
from leanbert.models.stored import ModelMetadata

RECORDS = [
    {"text": "good film", "label": "pos"},
    {"text": "bad film", "label": "neg"},
    {"text": "fine", "label": "pos"},
]


def data_of(tmp_path, records=RECORDS, val=None, setup=True, **settings):
    paths = {}
    for part, some in (("train", records), ("val", val or records)):
        paths[f"{part}_files"] = str(tmp_path / f"{part}.jsonl")
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in some))
    data = ClassificationData(
        **paths, **{"vocab_size": 40, "max_length": 16, "batch_size": 1, "cache_dir": str(tmp_path / "c"), **settings}
    )
    if setup:
        data.setup("fit")
    return data


def test_texts_share_a_row_and_each_has_its_label(tmp_path):
    data = data_of(tmp_path, max_length=24)
    assert data.labels == ["pos", "neg"]
    batch = data.evaluation_rows("val")[np.asarray([0])]
    assert batch.targets.tolist() == [[0, 1, 0]]
    assert (batch.inputs.input_ids[0, batch.target_index[0]] == data.tokenizer.cls_id).all()
    assert batch.inputs.document_ids[0, batch.target_index[0]].tolist() == [0, 1, 2]


def test_several_labels_and_numbers(tmp_path):
    several = [{"text": "a", "label": ["x", "y"]}, {"text": "b", "label": []}, {"text": "c", "label": "y,z"}]
    data = data_of(tmp_path, several, problem="multi", max_length=24)
    assert data.labels == ["x", "y", "z"]
    assert data.evaluation_rows("val")[np.asarray([0])].targets.tolist() == [[[1, 1, 0], [0, 0, 0], [0, 1, 1]]]
    numbers = [{"text": "a", "label": 1.5}, {"text": "b", "label": -2}]
    data = data_of(tmp_path, numbers, problem="regression", max_length=16)
    assert data.labels == ["label"]
    targets = data.evaluation_rows("val")[np.asarray([0])].targets
    assert targets[0, :2, 0].tolist() == [1.5, -2.0]
    assert targets.dtype == torch.float32


def test_pairs_have_segments_and_the_longer_text_is_cut():
    tokenizer = TextTokenizer.train(lambda: ["a b c d e f g h"], vocab_size=40)
    ((ids, segments, _, needed),) = encode_texts([["a b", "c d e f g h"]], tokenizer, 9)
    cls, sep = tokenizer.cls_id, tokenizer.sep_id
    pieces = [p[0] for p in tokenizer.encode_words(list("abcd"))]
    assert needed == 11
    assert ids[:4] == [cls, *pieces[:2], sep]
    assert ids[4:6] == pieces[2:]
    assert (len(ids), ids[-1]) == (9, sep)
    assert segments == [0, 0, 0, 0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("record", "settings", "message"),
    [
        ({"text": "a"}, {}, r'train\.jsonl:1: no field "label"'),
        ({"text": "a", "label": None}, {}, r'train\.jsonl:1: no field "label" but null'),
        ({"text": "a", "label": ["x"]}, {}, r"train\.jsonl:1: field \"label\" is \['x'\], no single label"),
        (
            {"text": "a", "label": "high"},
            {"problem": "regression"},
            r'train\.jsonl:1: "high" is no finite number',
        ),
    ],
)
def test_bad_records_name_file_and_line(tmp_path, record, settings, message):
    with pytest.raises(UserError, match=message):
        data_of(tmp_path, [record], **settings)


def test_an_unknown_label_in_evaluation_is_named(tmp_path):
    with pytest.raises(UserError, match=r"val\.jsonl:1: label 'odd' is not among the 2 of the training examples"):
        data_of(tmp_path, val=[{"text": "a", "label": "odd"}])


def batch_of(data, part="val"):
    return data.evaluation_rows(part)[np.arange(data.packing(part).rows)]


@pytest.mark.parametrize("labels", [["neg", "pos"], ["neg", "odd", "pos"]])
def test_the_labels_of_a_checkpoint_number_those_of_all_parts(tmp_path, labels):
    assert batch_of(data_of(tmp_path, max_length=24)).targets.tolist() == [[0, 1, 0]]
    data = data_of(tmp_path, max_length=24, setup=False)  # the caches are those of before
    data.adopt(ModelMetadata("classification", labels=labels))
    data.setup("fit")
    assert data.labels == labels
    expected = [labels.index(label) for label in ("pos", "neg", "pos")]
    assert batch_of(data).targets.tolist() == [expected]
    assert sorted(batch_of(data, "train").targets.flatten().tolist()) == sorted(expected)
    assert data.metadata("x") == ModelMetadata("x", max_length=24, problem="single", texts=1, labels=labels)


def test_several_labels_are_numbered_by_the_checkpoint_too(tmp_path):
    several = [{"text": "a", "label": ["x", "y"]}, {"text": "b", "label": ["y"]}]
    data = data_of(tmp_path, several, problem="multi", max_length=24, setup=False)
    data.adopt(ModelMetadata("classification", labels=["z", "y", "x"], problem="multi"))
    data.setup("fit")
    assert batch_of(data).targets[0, :2].tolist() == [[0, 1, 1], [0, 1, 0]]


def test_a_training_label_that_the_checkpoint_does_not_know_is_named(tmp_path):
    data = data_of(tmp_path, setup=False)
    data.adopt(ModelMetadata("classification", labels=["pos", "odd"]))
    message = r"train\.jsonl:2: label 'neg' is not among the 2 of the model \(pos, odd\)"
    with pytest.raises(UserError, match=message):
        data.setup("fit")


def test_settings_that_a_checkpoint_fixes_replace_others_with_a_line(tmp_path, capsys):
    data = data_of(tmp_path, max_length=24, problem="multi", setup=False)
    data.adopt(ModelMetadata("classification", labels=["pos", "neg"], problem="single", max_length=16))
    assert (data.hparams["max_length"], data.problem) == (16, "single")
    assert capsys.readouterr().err.splitlines() == [
        "data.max_length: 16, as the model was trained, not 24",
        "data.problem: single, as the model was trained, not multi",
    ]


def test_the_head_of_a_model_to_start_from_is_kept_where_it_knows_all_labels(tmp_path, capsys):
    data = data_of(tmp_path, setup=False)
    data.start_from(ModelMetadata("classification", labels=["odd", "neg", "pos"]))
    data.setup("fit")
    assert data.labels == ["odd", "neg", "pos"]
    assert batch_of(data).targets.flatten().tolist()[:2] == [2, 1]
    data = data_of(tmp_path, setup=False)
    data.start_from(ModelMetadata("classification", labels=["odd", "pos"]))
    data.setup("fit")
    assert data.labels == ["pos", "neg"]
    assert "model.init_from: does not know neg, so its output layer is made anew" in capsys.readouterr().err


@pytest.mark.parametrize("problem", ["single", "multi"])
def test_labels_that_tell_nothing_apart_are_refused(tmp_path, problem):
    records = [{"text": "a", "label": "spam" if problem == "single" else []}] * 2
    found = r'one label \("spam"\)' if problem == "single" else "no label"
    with pytest.raises(UserError, match=rf"the training examples have {found}, nothing to tell apart"):
        data_of(tmp_path, records, problem=problem)


def test_names_of_labels_that_are_numbers(tmp_path):
    records = [{"text": "a", "label": 1}, {"text": "b", "label": "0"}, {"text": "c", "label": "good"}]
    assert data_of(tmp_path, records, label_names=["bad", "good"]).labels == ["good", "bad"]
    with pytest.raises(
        UserError, match=r"train\.jsonl:1: label '2' is neither a name nor a number of the 2 of data\.l"
    ):
        data_of(tmp_path, [{"text": "a", "label": 2}], label_names=["bad", "good"])


def test_a_yes_or_no_to_each_label(tmp_path):
    records = [
        {"text": "a", "label": [0, 1, 0]},
        {"text": "b", "label": [1.0, 0.0, 0.0]},
        {"text": "c", "label": "[1, 1, 0]"},
    ]
    data = data_of(tmp_path, records, problem="multi", max_length=24)
    assert data.labels == ["0", "1", "2"]  # also the last, which is never given
    assert batch_of(data).targets[0].tolist() == [[0, 1, 0], [1, 0, 0], [1, 1, 0]]
    assert data_of(tmp_path, records, problem="multi", label_names=["a", "b", "c"]).labels == ["a", "b", "c"]


def test_a_model_says_how_many_texts_it_was_trained_on(tmp_path):
    single, pairs = data_of(tmp_path, setup=False), data_of(tmp_path, setup=False, pair_field="other")
    said = [data.metadata("classification") for data in (single, pairs)]
    assert [metadata.texts for metadata in said] == [1, 2]
    (tmp_path / "x.txt").write_text("a\tb\n")
    files = [str(tmp_path / "x.txt")]
    assert (list(single.inputs(files)), list(pairs.inputs(files))) == ([["a\tb"]], [["a", "b"]])
    single.adopt(said[1])
    assert list(single.inputs(files)) == [["a", "b"]]
    pairs.adopt(said[0])
    with pytest.raises(UserError, match=r"x\.txt:1: is a pair, but the model was trained on single texts\. Leave data"):
        list(pairs.inputs(files))
