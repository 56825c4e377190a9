import json

import numpy as np
import pytest

from leanbert.data.batches.batch import IGNORED
from leanbert.data.batches.sentences import Sentence, encode_sentences
from leanbert.data.token_labels import SemanticRoleData, TokenLabelData
from leanbert.data.tokenizers.tokenizer import TextTokenizer
from leanbert.errors import UserError
from leanbert.messages import say_once
from leanbert.models.stored import ModelMetadata

RECORDS = [
    {"tokens": ["The", "cook", "eats", "."], "predicate": 2, "labels": ["B-A0", "I-A0", "B-V", "O"]},
    {"tokens": ["He", "said", "she", "left"], "predicate": 1, "labels": ["B-A0", "B-V", "B-A1", "I-A1"]},
    {"tokens": ["He", "said", "she", "left"], "predicate": 3, "labels": ["O", "O", "B-A0", "B-V"]},
]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def role_data(tmp_path, records=RECORDS, setup=True, **settings):
    file = write(tmp_path / "train.jsonl", records)
    defaults = {
        "val_files": file,
        "vocab_size": 60,
        "max_length": 32,
        "batch_size": 2,
        "cache_dir": str(tmp_path / "c"),
    }
    data = SemanticRoleData(train_files=file, **{**defaults, **settings})
    if setup:
        data.setup("fit")
    return data


def test_predicates_are_marked_and_unmarked_sentences_added(tmp_path):
    data = role_data(tmp_path)
    assert data.labels == ["B-A0", "I-A0", "B-V", "O", "B-PRED", "B-A1", "I-A1"]
    assert data.statistics["train"].documents == 5  # three predicates, and two sentences in which to find them
    batch = data.evaluation_rows("val")[np.asarray([0])]
    separator, first = data.tokenizer.separator_id, batch.inputs.input_ids[0][batch.inputs.document_ids[0] == 0]
    assert (first == separator).sum() == 3  # around the predicate, and at the end
    named = [data.labels[t] for t in batch.targets[0].tolist() if t != IGNORED]
    assert named[:8] == ["B-A0", "I-A0", "B-V", "O", "O", "O", "B-PRED", "O"]
    words = batch.inputs.input_ids[0][batch.target_index[0, :4]]
    pieces = [ids[0] for ids in data.tokenizer.encode_words(["The", "cook", "eats", "."])]
    assert words.tolist() == pieces


def test_segments_mark_without_tokens(tmp_path):
    data = role_data(tmp_path, mark="segments", find_predicates=False)
    batch = data.evaluation_rows("val")[np.asarray([0])]
    assert data.statistics["train"].documents == 3
    pieces = data.tokenizer.encode_words(["eats"])[0]
    assert batch.inputs.input_ids[0][batch.inputs.segment_ids[0] == 1].tolist()[: len(pieces)] == pieces


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
        ({"predicate": "two"}, r"train\.jsonl:1: predicate 'two'"),
        ({"predicate": 1}, r"train\.jsonl:1: predicate 1, counted from 0, is I-A0, but word 2 is B-V"),
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
    assert [(place, sentence.tokens, labels) for place, sentence, labels in data.reader.read(files)] == [
        (f"{columns}:1", ["left"], ["O"]),
        (f"{records}:1", ["Rome"], ["B-CITY"]),
    ]


@pytest.mark.parametrize("field", ["tokens", "labels", "predicate"])
def test_a_missing_field_is_named(tmp_path, field):
    record = {name: value for name, value in RECORDS[0].items() if name != field}
    with pytest.raises(UserError, match=rf'train\.jsonl:1: no field "{field}"'):
        role_data(tmp_path, [record])


def tagged(tmp_path, text, name="eng.conll", **settings):
    """Return the words and tags of a file with this text."""
    path = tmp_path / name
    path.write_text(text)
    data = TokenLabelData(train_files=str(path), **settings)
    return [(" ".join(sentence.tokens), " ".join(labels)) for _, sentence, labels in data.reader.read([str(path)])]


CONLL_2003 = """-DOCSTART- -X- -X- O

Mira NNP I-NP I-PER
Holt NNP I-NP I-PER
left VBD I-VP O
Varna NNP I-NP I-LOC

Anna NNP I-NP I-PER
Ben NNP I-NP B-PER
"""


@pytest.mark.parametrize("name", ["eng.conll", "eng.train", "train.txt"])
def test_conll_2003_as_it_is_distributed(tmp_path, capsys, name):
    assert tagged(tmp_path, CONLL_2003, name) == [
        ("Mira Holt left Varna", "B-PER I-PER O B-LOC"),
        ("Anna Ben", "B-PER B-PER"),
    ]
    assert f"{tmp_path / name}: tags are IOB1, and read as the spans that they mean\n" == capsys.readouterr().err


def test_each_file_has_a_scheme_of_its_own(tmp_path):
    (tmp_path / "other.conll").write_text("Rome NNP B-LOC\n")
    (tmp_path / "eng.conll").write_text("Rome NNP I-LOC\n")
    data = TokenLabelData(train_files=str(tmp_path / "*.conll"))
    assert [labels for _, _, labels in data.reader.read([str(tmp_path / "*.conll")])] == [
        ["B-LOC"],
        ["B-LOC"],
    ]


def test_tags_that_are_numbers_have_names(tmp_path):
    record = '{"tokens": ["Ada", "left"], "labels": [1, 0]}\n'
    assert tagged(tmp_path, record, "a.jsonl", label_names=["O", "B-PER"]) == [("Ada left", "B-PER O")]
    assert tagged(tmp_path, "Ada 1\nleft 0\n", label_names=["O", "B-PER"]) == [("Ada left", "B-PER O")]
    with pytest.raises(UserError, match=r"a\.jsonl:1: tag 1 is a number\. Set data\.label_names"):
        tagged(tmp_path, record, "a.jsonl")
    with pytest.raises(UserError, match=r"eng\.conll:1: tag 0 is \"1\"\..*data\.label_names"):
        tagged(tmp_path, "Ada 1\nleft 0\n")
    with pytest.raises(
        UserError, match=r"a\.jsonl:1: label 1 is neither a name nor a number of the 1 of data\.label_names"
    ):
        tagged(tmp_path, record, "a.jsonl", label_names=["O"])
    with pytest.raises(UserError, match=r"a\.jsonl:1: True is no tag"):
        tagged(tmp_path, '{"tokens": ["Ada"], "labels": [true]}\n', "a.jsonl")


def test_data_sets_and_their_parquet_files_bring_the_names_of_tags(tmp_path):
    datasets = pytest.importorskip("datasets")
    names = datasets.ClassLabel(names=["O", "B-PER"])
    features = datasets.Features(
        {"tokens": datasets.Sequence(datasets.Value("string")), "ner_tags": datasets.Sequence(names)}
    )
    rows = {"tokens": [["Ada", "left"], ["Bye"]], "ner_tags": [[1, 0], [0]]}
    made = datasets.Dataset.from_dict(rows, features=features)
    made.save_to_disk(str(tmp_path / "set"))
    made.to_parquet(str(tmp_path / "a.parquet"))
    for file in (f"hf:{tmp_path / 'set'}", str(tmp_path / "a.parquet")):
        data = TokenLabelData(train_files=file, labels_field="ner_tags")
        assert [labels for _, _, labels in data.reader.read([file])] == [["B-PER", "O"], ["O"]]


def test_lists_that_pandas_wrote_are_read(tmp_path):
    text = "tokens,labels\n\"['Ada', 'left']\",\"['B-PER', 'O']\"\n"
    assert tagged(tmp_path, text, "a.csv") == [("Ada left", "B-PER O")]


def test_tables_hold_predicates_and_are_answered_as_they_are_trained_on(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("tokens,labels,predicate\n\"['The', 'cook', 'runs']\",\"['B-A0', 'I-A0', 'B-V']\",2.0\n")
    data = SemanticRoleData(train_files=str(path))
    expected = Sentence(["The", "cook", "runs"], 2)
    assert next(sentence for _, sentence, _ in data.reader.read([str(path)])) == expected
    assert list(data.reader.inputs([str(path)])) == [expected]


def test_text_files_of_words_and_tags_are_answered_as_columns(tmp_path, capsys):
    say_once.cache_clear()
    path = tmp_path / "a.txt"
    path.write_text("Mira B-PER\nruns O\n\nParis B-LOC\n")
    data = TokenLabelData(train_files=str(path))
    assert [sentence.tokens for sentence in data.reader.inputs([str(path)])] == [["Mira", "runs"], ["Paris"]]
    assert "each line ends in a tag, and is a word" in capsys.readouterr().err
    path.write_text("Vitamin B-12\nruns O\nGroup O is common\n")
    assert [len(sentence.tokens) for sentence in data.reader.inputs([str(path)])] == [2, 2, 4]


def test_columns_that_are_named_as_a_table_are_told_by_their_tags(tmp_path):
    with pytest.raises(UserError, match=r"a\.tsv: has a word and its tag in each line\. Let its name end in \.conll"):
        tagged(tmp_path, "Mira\tB-PER\nruns\tO\n\nParis\tB-LOC\n", "a.tsv")


def test_a_checkpoint_numbers_the_tags_of_all_parts(tmp_path):
    labels = ["O", "B-V", "I-A1", "B-A1", "I-A0", "B-A0", "B-PRED"]
    first = role_data(tmp_path)
    data = role_data(tmp_path, setup=False)
    data.adopt(ModelMetadata("srl", labels=labels, mark="tokens"))
    data.setup("fit")
    assert data.cache("val").folder == first.cache("val").folder
    for part in ("train", "val"):
        ours, theirs = (each.evaluation_rows(part)[np.asarray([0])].targets for each in (data, first))
        spelled = [
            [each.labels[tag] for tag in tags[tags != IGNORED]] for each, tags in ((data, ours), (first, theirs))
        ]
        assert spelled[0] == spelled[1]
    data = role_data(tmp_path, setup=False)
    data.adopt(ModelMetadata("tagging", labels=labels[:-1]))
    with pytest.raises(UserError, match=r"train\.jsonl:\d: label 'B-PRED' is not among the 6 of the model \(O, B-V"):
        data.setup("fit")
    data = role_data(tmp_path, setup=False, mark="segments", find_predicates=False)
    data.adopt(ModelMetadata("srl", labels=labels, mark="tokens", find_predicates=True))
    assert (data.mark, data.hparams["find_predicates"]) == ("tokens", True)


def test_labels_that_only_evaluation_has_are_named(tmp_path, capsys):
    val = [{"tokens": ["He", "left"], "predicate": 1, "labels": ["B-A9", "B-V"]}]
    role_data(tmp_path, val_files=write(tmp_path / "val.jsonl", val))
    assert (
        "data.val_files: B-A9 not among the labels of the training examples: count as missed" in capsys.readouterr().err
    )


def test_tags_of_one_kind_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"tokens": ["a", "b"], "labels": ["O", "O"]}])
    data = TokenLabelData(train_files=path, val_files=path, cache_dir=str(tmp_path / "c"))
    with pytest.raises(UserError, match=r'the training examples have one label \("O"\), nothing to tell apart'):
        data.setup("fit")
