"""A sharded model against the same model whole, in float64: weights, gradients, evaluation."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from leanbert.compression.structured import prune_structured
from leanbert.distributed.parallelize import gathered, parallelize, unreduced
from leanbert.distributed.sharding import pretend_group, shard
from leanbert.distributed.state import shard_state
from leanbert.errors import UserError
from leanbert.memory.checkpointing import set_checkpointing
from leanbert.memory.step import backpropagate_all_but_last
from tests.distributed.ranks import on_ranks
from tests.tiny import PlainTask, tiny_model, unequal_batch


def prepare(model):
    prune_structured(model, 1, 40)
    set_checkpointing(model.blocks, "input", 1)


def make():
    return tiny_model(position="sinusoidal")  # with a buffer that no checkpoint has


def mesh_of(shape):
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def step_on(shape, micro_batch, rank):
    """Run the passes of a step; return its loss, whole weights, buffers, gradients, and this rank's numbers of both."""
    model = parallelize(make, prepare, mesh_of(shape))
    world_size = torch.distributed.get_world_size()
    batch = unequal_batch().split(8 // world_size)[rank]  # ranks have unequal numbers of targets

    def sum_over_ranks(value):
        torch.distributed.all_reduce(value)
        return value

    last, total = backpropagate_all_but_last(
        PlainTask(model), batch, micro_batch=micro_batch, world_size=world_size, sum_over_ranks=sum_over_ranks,
        no_sync=partial(unreduced, model),
    )  # fmt: skip
    last.backward()
    gradients = {name: whole(parameter.grad).numpy() for name, parameter in model.named_parameters()}
    weights = {name: whole(tensor).detach().numpy() for name, tensor in model.named_parameters()}
    buffers = {name: tensor.numpy() for name, tensor in model.named_buffers()}
    held = sum(parameter.to_local().numel() for parameter in model.parameters())
    with torch.no_grad(), gathered(model):
        for _ in range(rank + 1):  # ranks run the model as often as they like
            scores = model(unequal_batch().inputs, unequal_batch().target_index).numpy()
    return {
        "loss": sum_over_ranks(total).item(), "weights": weights, "buffers": buffers, "gradients": gradients,
        "held": held, "scores": scores,
    }  # fmt: skip


@pytest.fixture(scope="module")
def alone():
    model = make()
    prepare(model)
    last, total = backpropagate_all_but_last(PlainTask(model), unequal_batch())
    last.backward()
    with torch.no_grad():
        scores = model(unequal_batch().inputs, unequal_batch().target_index)
    return model, total.item(), scores


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "micro_batch"), [((2,), 4), ((2,), 1), ((2, 2), 1)])
def test_weights_and_gradients_are_those_of_one_device(alone, shape, micro_batch):
    model, loss, scores = alone
    parameters = dict(model.named_parameters())
    for found in on_ranks(partial(step_on, shape, micro_batch), torch.Size(shape).numel()):
        assert found["loss"] == pytest.approx(loss, rel=1e-12)
        assert found["weights"].keys() == parameters.keys()
        for name, parameter in parameters.items():
            assert torch.equal(torch.from_numpy(found["weights"][name]), parameter.detach()), name
            torch.testing.assert_close(
                torch.from_numpy(found["gradients"][name]), parameter.grad, rtol=1e-9, atol=1e-14
            )
        for name, buffer in model.named_buffers():
            assert torch.equal(torch.from_numpy(found["buffers"][name]), buffer), name
        torch.testing.assert_close(torch.from_numpy(found["scores"]), scores, rtol=1e-12, atol=1e-14)
        assert found["held"] <= sum(parameter.numel() for parameter in model.parameters()) / 2 + 64


def test_without_a_mesh_the_model_is_whole():
    model = parallelize(make, prepare, None)
    assert model.config.num_heads == 1
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())


def test_state_is_sharded_as_its_parameters():
    with pretend_group(2) as mesh:
        model = tiny_model()
        shard(model, mesh)
        optimizer = torch.optim.AdamW(model.parameters())
        first = next(model.parameters())
        moment = torch.arange(first.numel()).view(first.shape)
        state = {"state": {0: {"exp_avg": moment, "step": torch.tensor(3.0)}}, "param_groups": [{"params": [0]}]}
        found = shard_state(state, optimizer)["state"][0]
        assert torch.equal(found["exp_avg"].to_local(), moment[: first.shape[0] // 2])
        assert found["exp_avg"].shape == first.shape
        assert found["step"] == 3.0


def test_blocks_that_share_weights_are_refused():
    with pretend_group(2) as mesh:
        model = tiny_model()
        model.blocks[1].feed_forward = model.blocks[0].feed_forward
        with pytest.raises(UserError, match="share weights"):
            shard(model, mesh)
