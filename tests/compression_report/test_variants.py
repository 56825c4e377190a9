"""Which variants leave a folder for transformers, and what is said of those that cannot."""

import pytest
import torch
import transformers

import leanbert
from leanbert.api import Pretrained
from leanbert.compression.low_rank import make_embedding_low_rank, make_low_rank
from leanbert.compression.structured import prune_structured
from leanbert.compression_report.report import Row, folders_in_words
from leanbert.compression_report.variants import leave_huggingface
from leanbert.data.tokenizers.tokenizer import TextTokenizer
from leanbert.models.packed_inputs import PackedInputs
from tests.compression.onnx.models import make

NO_CLASS = (
    "encoder.blocks.0.attention.output.down: the model has another layer there, such as one of low rank, which no "
    "class of transformers has. Export with onnx"
)


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer.train(lambda: ["the old cook gives a guest the cake"] * 3, vocab_size=100)


def test_a_pruned_model_leaves_as_it_is_before_quantization_and_once(tmp_path, tokenizer):
    model, metadata = make("mlm", "bert")
    prune_structured(model, 1, 20)
    rows = [Row("pruned", ["structured_pruning=0.5"], ""), Row("b", ["structured_pruning=0.5", "quantize=int8"], "")]
    rows.append(Row("int8", ["quantize=int8"], ""))
    given = Pretrained(model, tokenizer, metadata)
    for number, row in enumerate(rows):
        leave_huggingface(given, row, tmp_path, f"{row.name}/hf", rows[:number])
    assert [row.huggingface for row in rows] == ["pruned/hf", "pruned/hf", "int8/hf"]
    assert {path.name for path in tmp_path.iterdir()} == {"pruned", "int8"}
    theirs = transformers.BertForMaskedLM.from_pretrained(tmp_path / "pruned" / "hf").eval()
    assert (theirs.config.intermediate_size, theirs.config.num_attention_heads) == (20, 2)
    ids = torch.randint(100, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(PackedInputs.whole_rows(ids))
        torch.testing.assert_close(theirs(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert leanbert.load(tmp_path / "pruned" / "hf").model.config.num_heads == 2
    assert folders_in_words(rows) == "Hugging Face folders of models before quantization: pruned/hf, int8/hf"


def test_what_no_class_expresses_is_said_with_the_reason(tmp_path, tokenizer):
    model, metadata = make("mlm", "bert")
    assert make_low_rank(model, 0.5) > 0
    rows = [Row("thin", ["low_rank=0.5"], ""), Row("thin+int8", ["low_rank=0.5", "quantize=int8"], "")]
    for number, row in enumerate(rows):
        leave_huggingface(Pretrained(model, tokenizer, metadata), row, tmp_path, f"{row.name}/hf", rows[:number])
    assert [(row.huggingface, row.no_huggingface) for row in rows] == [(None, NO_CLASS)] * 2
    assert folders_in_words(rows) == f"None of thin: {NO_CLASS}"
    assert not list(tmp_path.iterdir())


def test_an_embedding_of_two_matrices_is_none_of_transformers(tmp_path, tokenizer):
    model, metadata = make("classification", "bert")
    rows = len(model.encoder.embeddings.token.weight)
    make_embedding_low_rank(model, 0.3, torch.zeros(rows, dtype=torch.int64))
    row = Row("thin", ["low_rank_embedding=0.3"], "")
    leave_huggingface(Pretrained(model, tokenizer, metadata), row, tmp_path, "thin/hf")
    assert row.huggingface is None
    assert row.no_huggingface.startswith("encoder.embeddings.projection.weight: the model has another layer there")
    assert not list(tmp_path.iterdir())
