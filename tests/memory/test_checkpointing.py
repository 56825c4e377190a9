import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from leanbert.errors import UserError
from leanbert.memory.checkpointing import set_checkpointing
from tests.tiny import PlainTask, tiny_model, unequal_batch


def gradients(model, batch, seed=None):
    if seed is not None:
        torch.manual_seed(seed)
    PlainTask(model).loss_sum(batch).backward()
    values = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return values


def flops(model, batch):
    with FlopCounterMode(display=False) as counter:
        PlainTask(model).loss_sum(batch).backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def block_flops(model, batch):
    """Of one forward pass of one block."""
    rows, length = batch.inputs.input_ids.shape
    width = model.config.hidden_size
    context = model.encoder.make_context(batch.inputs, torch.empty(0).double())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.encoder.blocks[0](torch.zeros(rows, length, width, dtype=torch.float64), context)
    return counter.get_total_flops()


@pytest.mark.parametrize("preset", ["bert", "modern"])
@pytest.mark.parametrize("keep", ["input", "products"])
@pytest.mark.parametrize("every", [1, 2])
def test_gradients_are_the_same(preset, keep, every):
    model, batch = tiny_model(preset=preset), unequal_batch()
    expected = gradients(model, batch)
    assert set_checkpointing(model.encoder.blocks, keep, every) == 2 // every
    for name, value in gradients(model, batch).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("keep", ["input", "products"])
def test_dropout_is_the_same_in_the_second_forward_pass(keep):
    model, batch = tiny_model(preset="bert", dropout=0.2, attention_dropout=0.2), unequal_batch()
    expected = gradients(model, batch, seed=5)
    set_checkpointing(model.encoder.blocks, keep)
    for name, value in gradients(model, batch, seed=5).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("every", [1, 2])
def test_costs_exactly_one_more_forward_pass_of_the_chosen_blocks(every):
    model, batch = tiny_model(preset="bert"), unequal_batch()
    plain, block = flops(model, batch), block_flops(model, batch)
    set_checkpointing(model.encoder.blocks, "input", every)
    assert flops(model, batch) - plain == block * (2 // every)


def test_of_a_pre_norm_block_all_but_the_last_product_is_computed_again():
    """Nothing needs the feed-forward's output again: it is only added to the residual stream."""
    model, batch = tiny_model(), unequal_batch()
    plain, block = flops(model, batch), block_flops(model, batch)
    set_checkpointing(model.encoder.blocks, "input")
    last = 2 * batch.inputs.input_ids.numel() * model.config.intermediate_size * model.config.hidden_size
    assert flops(model, batch) - plain == 2 * (block - last)


def test_selective_checkpointing_computes_no_product_again():
    model, batch = tiny_model(preset="bert"), unequal_batch()
    plain = flops(model, batch)
    set_checkpointing(model.encoder.blocks, "products")
    assert flops(model, batch) == plain


def saved_bytes(model, batch):
    """What autograd holds between forward and backward, weights left out, each storage once."""
    storages = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        PlainTask(model).loss_sum(batch)
    return sum(storage.nbytes() for storage in storages.values())


def test_only_block_inputs_are_kept():
    """Each block more costs its input, B x S x D in fp64, and nothing else."""
    batch = unequal_batch()
    sizes = []
    for layers in (2, 3):
        model = tiny_model(preset="bert", num_layers=layers)
        set_checkpointing(model.encoder.blocks, "input")
        sizes.append(saved_bytes(model, batch))
    assert sizes[1] - sizes[0] == batch.inputs.input_ids.numel() * 32 * 8


def test_without_gradients_nothing_is_recomputed():
    model, batch = tiny_model(), unequal_batch()
    set_checkpointing(model.encoder.blocks, "input")
    with torch.no_grad():
        assert torch.isfinite(PlainTask(model).loss_sum(batch))


def test_no_blocks_is_an_error():
    with pytest.raises(UserError, match="no blocks"):
        set_checkpointing([torch.nn.Linear(2, 2)], "input")


def test_compiled_blocks_stay_compiled():
    model, batch = tiny_model(preset="bert"), unequal_batch()
    expected = gradients(model, batch)
    set_checkpointing(model.encoder.blocks, "input")
    calls = []
    for block in model.encoder.blocks:
        block.compile(backend=lambda graph, inputs: calls.append(1) or graph.forward)
    for name, value in gradients(model, batch).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-12)
    assert calls
