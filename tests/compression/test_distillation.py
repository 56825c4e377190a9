import math

import pytest
import torch

from leanbert.compression.distillation import (
    hidden_loss,
    recorded_states,
    relation_loss,
    soft_binary_loss,
    soft_loss,
)
from tests.pretrained.pairs import packed_batch, tiny_seq2seq
from tests.tiny import tiny_model, unequal_batch


def test_the_soft_loss_is_the_divergence_from_the_teacher_times_the_square_of_the_temperature():
    student, teacher = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[2.0 * math.log(3.0), 0.0]]])
    # at temperature 2 the teacher says 3/4 and 1/4, the student one half each
    expected = 4 * (0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5))
    assert soft_loss(student, teacher, 2.0).tolist() == [[pytest.approx(expected, rel=1e-6)]]
    assert soft_loss(teacher, teacher, 2.0).abs().max() == 0


def test_the_soft_loss_of_labels_that_are_given_or_not_is_that_of_two_labels():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 5, 4, generator=generator).unbind(0)
    pairs = [torch.stack((scores, torch.zeros_like(scores)), dim=-1) for scores in (student, teacher)]
    torch.testing.assert_close(soft_binary_loss(student, teacher, 3.0), soft_loss(*pairs, 3.0), atol=1e-5, rtol=1e-5)


def test_hidden_states_differ_in_units_of_the_teachers_square_at_real_places():
    teacher = torch.tensor([[[3.0, 4.0], [1.0, 0.0], [9.0, 9.0]]])
    student = torch.tensor([[[3.0, 3.0], [0.0, 0.0], [0.0, 0.0]]])
    real = torch.tensor([[True, True, False]])
    assert hidden_loss(student, teacher, real).item() == pytest.approx(1 / 25 + 1.0)


def test_recorded_states_are_what_blocks_take_and_give():
    model, batch = tiny_seq2seq(layers=1).eval(), packed_batch()
    with torch.no_grad(), recorded_states(model) as (encoder, decoder):
        memory = model.encode(batch.inputs)
        hidden, _ = model.hidden(batch.inputs, batch.decoder_inputs)
    assert len(encoder) == 2 * 3  # encoded twice
    assert len(decoder) == 2
    assert torch.equal(model.encoder.final_norm(encoder[-1]), memory)
    assert torch.equal(model.decoder.final_norm(decoder[-1]), hidden)
    assert model.encoder.states is None
    assert model.decoder.states is None


@pytest.mark.parametrize("preset", ["bert", "modern"])
def test_relations_are_compared_token_by_token_inside_documents(preset):
    batch = unequal_batch(rows=2, length=10)
    student, teacher = (
        tiny_model(seed=seed, preset=preset, hidden_size=size).eval() for seed, size in ((0, 32), (1, 64))
    )
    blocks = [model.encoder.blocks[-1] for model in (student, teacher)]
    with torch.no_grad():
        states = []
        for model in (student, teacher):
            with recorded_states(model) as (found,):
                model.encode(batch.inputs)
            states.append(found[-2])
        value = relation_loss(blocks[0], states[0], blocks[1], states[1], batch.inputs, heads=4)
        expected = _by_loops(blocks, states, batch.inputs, heads=4)
        assert relation_loss(blocks[1], states[1], blocks[1], states[1], batch.inputs, heads=4) == 0
    assert value.item() == pytest.approx(expected, rel=1e-5)


def _by_loops(blocks, states, inputs, heads):
    total = 0.0
    vectors = []
    for block, hidden in zip(blocks, states, strict=True):
        fused = block.attention.qkv(block.attention_norm(hidden) if block.pre_norm else hidden)
        vectors.append([part.chunk(heads, dim=-1) for part in fused.chunk(3, dim=-1)])
    rows, length = inputs.input_ids.shape
    for kind in range(3):
        for head in range(heads):
            own, known = (found[kind][head] for found in vectors)
            for row in range(rows):
                for place in range(length):
                    there = inputs.document_ids[row] == inputs.document_ids[row, place]
                    p, q = (
                        (part[row, there] @ part[row, place] / part.shape[-1] ** 0.5).softmax(-1)
                        for part in (known, own)
                    )
                    total += (p * (p / q).log()).sum().item()
    return total / (3 * heads)
