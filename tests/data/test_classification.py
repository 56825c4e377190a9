import json

import numpy as np
import pytest
import torch

from leanbert.data.classification import ClassificationData, encode_texts
from leanbert.data.tokenizer import TextTokenizer
from leanbert.errors import UserError

RECORDS = [
    {"text": "good film", "label": "pos"},
    {"text": "bad film", "label": "neg"},
    {"text": "fine", "label": "pos"},
]


def data_of(tmp_path, records=RECORDS, val=None, **settings):
    paths = {}
    for part, some in (("train", records), ("val", val or records)):
        paths[f"{part}_files"] = str(tmp_path / f"{part}.jsonl")
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in some))
    data = ClassificationData(
        **paths, **{"vocab_size": 40, "max_length": 16, "batch_size": 1, "cache_dir": str(tmp_path / "c"), **settings}
    )
    data.setup("fit")
    return data


def test_texts_share_a_row_and_each_has_its_label(tmp_path):
    data = data_of(tmp_path, max_length=24)
    assert data.labels == ["pos", "neg"]
    batch = data.evaluation_rows("val")[np.asarray([0])]
    assert batch.targets.tolist() == [[0, 1, 0]]
    assert (batch.input_ids[0, batch.target_index[0]] == data.tokenizer.cls_id).all()
    assert batch.document_ids[0, batch.target_index[0]].tolist() == [0, 1, 2]


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
    ((ids, segments, needed),) = encode_texts([["a b", "c d e f g h"]], tokenizer, 9)
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
            r"train\.jsonl:1: field \"label\" is 'high', no num",
        ),
    ],
)
def test_bad_records_name_file_and_line(tmp_path, record, settings, message):
    with pytest.raises(UserError, match=message):
        data_of(tmp_path, [record], **settings)


def test_an_unknown_label_in_evaluation_is_named(tmp_path):
    with pytest.raises(UserError, match=r"val\.jsonl:1: label 'odd' is not among the 2 of the training examples"):
        data_of(tmp_path, val=[{"text": "a", "label": "odd"}])
