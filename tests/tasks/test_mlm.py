from types import SimpleNamespace

import pytest
import torch

from leanbert.data.batches.loading import encode_lines
from leanbert.data.tokenizers.tokenizer import TextTokenizer
from leanbert.pretrained.build import build_model
from leanbert.tasks.mlm import fill_masks
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer.train(lambda: ["the cat sat on the mat"] * 20, vocab_size=80)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return build_model(tiny_config(), tokenizer.vocab_size).eval()


def test_fill_masks_returns_the_softmax_at_each_mask(tokenizer, model):
    texts = ["the [MASK] sat on [MASK] mat", "no mask", "[MASK]"]
    batch, _ = encode_lines(texts, tokenizer, 32)
    answers = fill_masks(model, tokenizer, batch, top_k=4)
    assert [answer["text"] for answer in answers] == texts
    assert [len(answer["masks"]) for answer in answers] == [2, 0, 1]
    alone, _ = encode_lines(texts[2:], tokenizer, 32)
    place = alone.inputs.input_ids[0].tolist().index(tokenizer.mask_id)
    probabilities = model(alone.inputs)[0, place].softmax(-1)
    for candidate in answers[2]["masks"][0]:
        index = tokenizer._tokenizer.token_to_id(candidate["token"])
        assert candidate["probability"] == pytest.approx(probabilities[index].item(), abs=2e-6)


def test_texts_without_a_mask_cost_no_forward(tokenizer):
    batch, _ = encode_lines(["a cat", "a mat"], tokenizer, 32)
    model = SimpleNamespace()  # calling it would fail
    assert [answer["masks"] for answer in fill_masks(model, tokenizer, batch, 3)] == [[], []]
