import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from leanbert.memory.checkpointing import run_block
from leanbert.memory.layer_major import ADDED, _add, run_in_slices
from tests.memory.test_checkpointing import block_flops, flops, gradients, saved_bytes
from tests.pretrained.pairs import packed_batch, tiny_seq2seq
from tests.tiny import tiny_model, unequal_batch, whole_rows


def slice_blocks(model, rows):
    for block in model.encoder.blocks:
        block.slice_rows = rows


@pytest.mark.parametrize("preset", ["bert", "modern"])
@pytest.mark.parametrize("rows", [1, 3, 8, 20])
def test_gradients_are_those_of_the_whole_batch(preset, rows):
    model, batch = tiny_model(preset=preset), unequal_batch()
    expected = gradients(model, batch)
    slice_blocks(model, rows)
    for name, value in gradients(model, batch).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-12)


def test_local_attention_and_one_document_a_row():
    model, batch = tiny_model(local_window=4, global_every=2), unequal_batch()
    batch.inputs = whole_rows(batch.inputs.input_ids)
    expected = gradients(model, batch)
    slice_blocks(model, 3)
    for name, value in gradients(model, batch).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-12)


def test_dropout_of_forward_and_backward_pass_agree():
    """With dropout in the second pass other than in the first, this derivative would be wrong."""
    model, batch = tiny_model(preset="bert", dropout=0.3, attention_dropout=0.3), unequal_batch()
    slice_blocks(model, 2)
    weight = model.encoder.blocks[1].feed_forward.output.weight

    def loss():
        torch.manual_seed(4)
        return model.loss_sum(batch.inputs, batch.target_index, batch.targets)

    loss().backward()
    slope, step = weight.grad[3, 5].item(), 1e-6
    with torch.no_grad():
        weight[3, 5] += step
    above = loss().item()
    with torch.no_grad():
        weight[3, 5] -= 2 * step
    assert (above - loss().item()) / (2 * step) == pytest.approx(slope, rel=1e-4)


def test_slices_and_blocks_draw_different_dropout():
    model, batch = tiny_model(preset="bert", dropout=0.5), unequal_batch()
    slice_blocks(model, 2)
    same = torch.ones(8, 16, 32, dtype=torch.float64, requires_grad=True)
    context = model.encoder.make_context(whole_rows(batch.inputs.input_ids), same)
    first, second = model.encoder.blocks
    second.load_state_dict(first.state_dict())
    torch.manual_seed(0)
    out = run_block(first, same, context)
    assert not torch.equal(out[:2], out[2:4])
    assert not torch.equal(out, run_block(second, same, context))
    torch.manual_seed(0)
    assert torch.equal(out, run_block(first, same, context))


def test_costs_one_more_forward_pass_of_all_blocks_and_keeps_their_inputs():
    model, batch = tiny_model(preset="bert"), unequal_batch()
    plain, block = flops(model, batch), block_flops(model, batch)
    slice_blocks(model, 2)
    assert flops(model, batch) - plain == 2 * block
    deeper = tiny_model(preset="bert", num_layers=3)
    slice_blocks(deeper, 2)
    assert saved_bytes(deeper, batch) - saved_bytes(model, batch) == batch.inputs.input_ids.numel() * 32 * 8


def test_gradients_of_many_slices_are_summed_in_float32():
    """In bfloat16 a sum of 1,024 ones stops at 256: one more is half a step of the grid there."""

    class Scale(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))

        def forward(self, hidden, context):
            return hidden * self.weight

    block = Scale()
    hidden = torch.ones(1024, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    run_in_slices(block, hidden, None, 1).sum().backward()
    assert block.weight.grad.item() == 1024


def test_what_comes_after_the_blocks_does_not_draw_what_came_before_them():
    """The decoder's embeddings come after the encoder's blocks."""
    model, seen = tiny_seq2seq(preset="bert", dropout=0.5, attention_dropout=0.0), []
    for block in model.blocks:
        block.slice_rows = 2
    for stack in model.stacks:
        stack.embeddings.register_forward_hook(lambda module, inputs, output: seen.append(output == 0))
    batch, masks = packed_batch(), []
    for _ in range(2):
        torch.manual_seed(1)
        model.hidden(batch.inputs, batch.decoder_inputs)
        masks.append(seen[-2:])
    for encoder, decoder in masks:
        width = decoder.shape[1]
        assert 0.4 < encoder.float().mean() < 0.6
        same = (encoder[:, :width] == decoder).float().mean()
        assert 0.45 < same < 0.55  # of unrelated masks: half
    assert all(torch.equal(one, other) for one, other in zip(*masks, strict=True))


def test_16_bit_gradients_are_not_converted_whole():
    total, gradient = torch.zeros(1024, 512), torch.ones(1024, 512, dtype=torch.bfloat16)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        _add([gradient], [total])
    sizes = [event.nbytes() for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert max(sizes, default=0) <= 4 * ADDED < total.nbytes
    assert total.eq(1).all()
