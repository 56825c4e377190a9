"""Counts by hand."""

import subprocess
import sys

import pytest
import torch

from leanbert.api import Pretrained
from leanbert.compression_report import measuring
from leanbert.compression_report.measuring import (
    LONG,
    OUTPUT_TOKENS,
    flops_per_token,
    peak_memory,
    prepared,
    time_in_turns,
    weights_of,
)
from leanbert.data.tokenizers.tokenizer import TextTokenizer
from tests.compression.onnx.models import make


def test_weights_are_counted_once_and_zeros_apart():
    model, _ = make("mlm")
    count, nonzero = weights_of(model)
    assert count == sum(parameter.numel() for parameter in model.parameters())
    with torch.no_grad():
        model.encoder.blocks[0].feed_forward.output.weight.zero_()
    zeros = model.encoder.blocks[0].feed_forward.output.weight.numel()
    assert weights_of(model) == (count, nonzero - zeros)


@pytest.mark.parametrize(("task", "positions"), [("tagging", LONG), ("tagging", 32), ("mlm", LONG)])
def test_operations_of_a_token_by_hand(task, positions):
    model, _ = make(task, max_positions=positions, hidden_size=32, num_heads=2, intermediate_size=64)
    length = min(LONG, positions)
    block = 32 * 3 * 32 + 32 * 32 + 32 * 2 * 64 + 64 * 32  # qkv, output, gated feed-forward
    scores = 2 * length * 32  # of queries with keys, and of the probabilities with values
    head = 32 * 32 + 32 * (3 if task == "tagging" else 128)  # dense, and scores of 3 labels or 128 rows
    assert flops_per_token(model) == 2 * (2 * (block + scores) + head)


def test_a_text_is_scored_once():
    model, _ = make("classification", max_positions=LONG)
    words, _ = make("tagging", max_positions=LONG)
    head = 2 * (32 * 32 + 32 * 3)
    assert flops_per_token(words) - flops_per_token(model) == pytest.approx(head * (1 - 1 / LONG))


def test_a_decoder_writes_so_many_tokens():
    model, _ = make("seq2seq", copy=True)
    calls = []
    start = model.start_decoding

    def counted(*arguments):
        decoding = start(*arguments)
        step = decoding.step
        decoding.step = lambda tokens: calls.append(tokens) or step(tokens)
        return decoding

    model.start_decoding = counted
    prepared(model, 3, 8)()
    assert len(calls) == OUTPUT_TOKENS
    assert {tokens.shape for tokens in calls} == {(3,)}


def test_calls_are_timed_in_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    found = time_in_turns(calls, 1e-9, lambda rounds: rounds)
    assert order == ["a", "a", "b", "b"] * 5  # the second counts
    assert {name: len(times) for name, times in found.items()} == {"a": 5, "b": 5}


@pytest.mark.slow
def test_memory_grows_with_the_model(tmp_path):
    found = []
    for width in (32, 768):
        model, metadata = make("classification", preset="bert", hidden_size=width, max_positions=LONG)
        tokenizer = TextTokenizer.train(lambda: ["a b c"], vocab_size=100)
        Pretrained(model, tokenizer, metadata).export(tmp_path / str(width))
        found.append(peak_memory(tmp_path / str(width)))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert found[1][0] - found[0][0] > 0.5 * weights
    assert all(ran > loaded > 0 for loaded, ran in found)


def test_memory_is_measured_without_the_libraries_of_training():
    imports = "\n".join(line for line in measuring._MEMORY.splitlines() if line.startswith(("import", "from")))
    subprocess.run(
        [sys.executable, "-c", f"{imports}\nassert not {{'lightning', 'transformers'}} & {{*sys.modules}}"], check=True
    )
