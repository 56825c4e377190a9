import torch

from leanbert.data.tokenizers.tokenizer import TextTokenizer
from leanbert.tasks.mlm import HiddenWord, filled_masks_table, hide_words

CORPUS = ["The cat | sat on the mat, un*der a_tree.", "Of *The* cat.", "mat"]


def tokenizer(**settings) -> TextTokenizer:
    return TextTokenizer.train(lambda: CORPUS * 20, **{"vocab_size": 80, **settings})


class Model(torch.nn.Module):
    """Is sure of one token everywhere, and keeps what it was given to read."""

    def __init__(self, sure_of: int, vocab_size: int) -> None:
        super().__init__()
        self.sure_of, self.vocab_size = sure_of, vocab_size

    def forward(self, inputs, target_index):
        self.read, self.asked = inputs.input_ids.clone(), target_index
        logits = torch.zeros(*target_index.shape, self.vocab_size)
        logits[..., self.sure_of] = 20.0
        return logits


def test_the_middle_word_of_one_token_is_hidden_where_it_stands_in_the_text():
    words = hide_words(["..!", *CORPUS], tokenizer(), count=2, length=64)
    assert [(word.text, word.text[word.start : word.end]) for word in words] == [(CORPUS[0], "mat"), (CORPUS[1], "The")]
    assert [word.token for word in words] == [6, 2]


def test_of_a_long_text_the_beginning_is_shown_and_only_what_the_model_reads_is_hidden():
    (word,) = hide_words(["cat " * 100], tokenizer(), count=1, length=8)
    assert word == HiddenWord(("cat " * 39)[:-1], 3, 12, 15)  # of 6 words that the model reads beside the template


def test_no_more_than_four_texts_are_looked_at_for_a_word():
    seen = iter(["...", "...", "...", "...", "cat"])
    assert hide_words(seen, tokenizer(), count=1, length=64) == []
    assert next(seen) == "cat"


def test_a_byte_level_word_is_hidden_without_the_space_before_it():
    own = tokenizer(kind="bpe", vocab_size=300, lowercase=False)
    assert own.whole_words("The cat, sat") == [(0, 0, 3), (1, 4, 7), (3, 9, 12)]


def test_the_table_shows_the_text_as_written_truth_and_candidates():
    own = tokenizer()
    truth = own.encode_bare(["mat"])[0][0]
    model = Model(truth, own.vocab_size)
    words = hide_words(CORPUS[:2], own, count=2, length=64)
    header, _, row, _ = filled_masks_table(model, own, words, length=64).split("\n")
    assert header == "| text | truth | model |"
    assert row.startswith("| The cat \\| sat on the \\[MASK\\], un\\*der a\\_tree. | mat | mat (100%), ")
    plain = own.encode_batch(CORPUS[:2], literal=True)
    plain[0][7] = plain[1][3] = own.mask_id  # one place is masked, nothing else is changed
    assert [row[: len(ids)] for row, ids in zip(model.read.tolist(), plain, strict=True)] == plain
    assert model.asked.tolist() == [[7], [3]]
