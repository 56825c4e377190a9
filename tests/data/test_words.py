import json

import numpy as np
import pytest

from leanbert.data.tokenizer import TextTokenizer
from leanbert.data.words import SemanticRoleData, Sentence, TokenLabelData, encode_sentences
from leanbert.errors import UserError
from leanbert.models.loss import IGNORED

RECORDS = [
    {"tokens": ["The", "cook", "eats", "."], "predicate": 2, "labels": ["B-A0", "I-A0", "B-V", "O"]},
    {"tokens": ["He", "said", "she", "left"], "predicate": 1, "labels": ["B-A0", "B-V", "B-A1", "I-A1"]},
    {"tokens": ["He", "said", "she", "left"], "predicate": 3, "labels": ["O", "O", "B-A0", "B-V"]},
]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def role_data(tmp_path, records=RECORDS, **settings):
    file = write(tmp_path / "train.jsonl", records)
    defaults = {
        "val_files": file,
        "vocab_size": 60,
        "max_length": 32,
        "batch_size": 2,
        "cache_dir": str(tmp_path / "c"),
    }
    data = SemanticRoleData(train_files=file, **{**defaults, **settings})
    data.setup("fit")
    return data


def test_predicates_are_marked_and_unmarked_sentences_added(tmp_path):
    data = role_data(tmp_path)
    assert data.labels == ["B-A0", "I-A0", "B-V", "O", "B-PRED", "B-A1", "I-A1"]
    assert data.statistics["train"].documents == 5  # three predicates, and two sentences in which to find them
    batch = data.evaluation_rows("val")[np.asarray([0])]
    separator, first = data.tokenizer.separator_id, batch.input_ids[0][batch.document_ids[0] == 0]
    assert (first == separator).sum() == 3  # around the predicate, and at the end
    named = [data.labels[t] for t in batch.targets[0].tolist() if t != IGNORED]
    assert named[:8] == ["B-A0", "I-A0", "B-V", "O", "O", "O", "B-PRED", "O"]
    words = batch.input_ids[0][batch.target_index[0, :4]]
    pieces = [ids[0] for ids in data.tokenizer.encode_words(["The", "cook", "eats", "."])]
    assert words.tolist() == pieces


def test_segments_mark_without_tokens(tmp_path):
    data = role_data(tmp_path, mark="segments", find_predicates=False)
    batch = data.evaluation_rows("val")[np.asarray([0])]
    assert data.statistics["train"].documents == 3
    pieces = data.tokenizer.encode_words(["eats"])[0]
    assert batch.input_ids[0][batch.segment_ids[0] == 1].tolist()[: len(pieces)] == pieces


def test_a_role_never_seen_in_training_has_a_name_after_the_labels(tmp_path):
    val = [{"tokens": ["He", "left"], "predicate": 1, "labels": ["B-A9", "B-V"]}]
    data = role_data(tmp_path, val_files=write(tmp_path / "val.jsonl", val))
    assert data.names("val") == [*data.labels, "B-A9"]
    targets = data.evaluation_rows("val")[np.asarray([0])].targets
    assert (targets == len(data.labels)).sum() == 1


def test_words_that_do_not_fit_are_left_out_and_counted():
    tokenizer = TextTokenizer.train(lambda: ["a b c d e f g h"], vocab_size=40)
    sentence = Sentence(list("abcdefgh"), 1)
    (whole,) = encode_sentences([sentence], tokenizer, 32)
    assert (len(whole.ids), len(whole.places), whole.needed) == (12, 8, 12)
    (cut,) = encode_sentences([sentence], tokenizer, 8)
    assert len(cut.ids) == 8
    assert cut.places == whole.places[:4]
    assert cut.ids[-1] == whole.ids[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": ["B-A0", "I-A1", "B-V", "O"]}, r'train\.jsonl:1: tag 1 is "I-A1" after "B-A0"'),
        ({"labels": ["B-A0"]}, r"train\.jsonl:1: 1 labels for 4 words"),
        ({"predicate": 4}, r"train\.jsonl:1: predicate 4 is not the place of one of 4 words"),
        ({"predicate": "2"}, r"train\.jsonl:1: predicate '2'"),
        ({"tokens": "The cook"}, r'train\.jsonl:1: field "tokens" is no list of str'),
        ({"labels": None}, r'train\.jsonl:1: no field "labels"'),
    ],
)
def test_bad_records_name_file_and_line(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        role_data(tmp_path, [{**RECORDS[0], **change}])


def test_a_sentence_that_is_too_long_can_be_refused(tmp_path):
    with pytest.raises(UserError, match=r"train\.jsonl:1: \d+ tokens, but a row has 8"):
        role_data(tmp_path, max_length=8, too_long="refuse", vocab_size=45)


def test_tags_come_from_columns_too(tmp_path):
    path = tmp_path / "ner.conll"
    path.write_text("EU NNP B-ORG\nleft VBD O\n\nBonn NNP B-LOC\n")
    data = TokenLabelData(
        train_files=str(path), val_files=str(path), vocab_size=60, max_length=16, cache_dir=str(tmp_path / "c")
    )
    data.setup("fit")
    assert data.labels == ["B-ORG", "O", "B-LOC"]


def test_records_and_columns_go_together_the_columns_first(tmp_path):
    columns, records = tmp_path / "a.conll", write(tmp_path / "b.jsonl", [{"w": ["Rome"], "t": ["B-CITY"]}])
    columns.write_text("left VBD O\n")
    files = [records, str(columns)]
    data = TokenLabelData(train_files=files, tokens_field="w", labels_field="t")
    assert [(place, sentence.tokens, labels) for place, sentence, labels in data.read(files, 0.0, 1.0)] == [
        (f"{columns}:1", ["left"], ["O"]),
        (f"{records}:1", ["Rome"], ["B-CITY"]),
    ]


@pytest.mark.parametrize("field", ["tokens", "labels", "predicate"])
def test_a_missing_field_is_named(tmp_path, field):
    record = {name: value for name, value in RECORDS[0].items() if name != field}
    with pytest.raises(UserError, match=rf'train\.jsonl:1: no field "{field}"'):
        role_data(tmp_path, [record])
