import torch

from leanbert.data.batches.batch import MLMBatch
from leanbert.data.tokenizers.tokenizer import TextTokenizer
from leanbert.tasks.mlm import filled_masks_table
from tests.tiny import whole_rows


def test_the_table_shows_context_truth_and_candidates():
    tokenizer = TextTokenizer.train(lambda: ["the cat | sat on the mat"] * 20, vocab_size=80)
    ids = torch.tensor(tokenizer.encode_batch(["the cat | sat on the mat"]))
    place = ids[0].tolist().index(tokenizer.encode_bare(["sat"])[0][0])
    truth = ids[0, place].clone()
    ids[0, place] = tokenizer.mask_id
    index = torch.tensor([[place, 0]])
    batch = MLMBatch(whole_rows(ids), index, torch.tensor([[int(truth), -100]]))
    logits = torch.zeros(1, 2, tokenizer.vocab_size)
    logits[0, 0, truth] = 20.0
    header, _, row = filled_masks_table(batch, logits, tokenizer, context=10).split("\n")
    assert header == "| text | truth | model |"
    assert row.startswith("| the cat \\| **[MASK]** on the mat | sat | sat (100%), ")
