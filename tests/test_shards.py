"""What is computed on shards, against the same of whole tensors: optimizers, their state in files, masks."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from leanbert.compression.pruning import add_movement, apply_masks, make_masks, sparsity_of
from leanbert.distributed.state import gather_state, shard_state
from leanbert.optim.build import OptimizerConfig, build_optimizer
from leanbert.shards import from_own, own, own_start
from tests.distributed.ranks import on_ranks

SHAPES = {"matrix": (100, 256), "odd": (37, 24), "vector": (5000,), "short": (4, 64), "single": (1, 8)}
OPTIMIZERS = ["sgd", "momentum", "adam", "adamw", "adafactor", "muon", "adamw8bit", "adamw4bit"]
SCOPES = [("global", 0.6, 1), ("layer", 0.3, 1), ("2:4", 0.5, 1), ("4:8", 0.5, 1), ("global", 0.5, 2)]


def tensors(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


@cache
def mesh_of(shape):
    return init_device_mesh("cpu", shape)


def sharded(tensor, shape):
    placements = [Replicate()] * (len(shape) - 1) + [Shard(0)]
    return distribute_tensor(tensor, mesh_of(shape), placements, src_data_rank=None)


class Model(nn.Module):
    def __init__(self, values):
        super().__init__()
        self.values = nn.ParameterDict({name: nn.Parameter(value) for name, value in values.items()})


def trained(name, place, steps, dtype=torch.float32, state=None, start=0):
    """Return weights and optimizer after some updates; `place` shards a tensor or does not."""
    model = Model({key: place(value) for key, value in tensors(0, dtype).items()})
    optimizer = build_optimizer(model, OptimizerConfig(name=name, lr=0.01))
    if state is not None:
        optimizer.load_state_dict(shard_state(state, optimizer))
    for step in range(start, start + steps):
        for key, value in tensors(step + 1, dtype).items():
            model.values[key].grad = place(value)
        optimizer.step()
    return model, optimizer


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().float().numpy()


def updates(rank):
    """Return whole weights after updates on two shards, and whole states before and after a passage through shards."""
    found = {}
    for name in OPTIMIZERS:
        for shape in ((2,), (2, 1)) if name in ("adamw", "adamw8bit") else ((2,),):
            model, optimizer = trained(name, lambda tensor, shape=shape: sharded(tensor, shape), 3)
            state = gather_state(optimizer.state_dict(), optimizer, keep=True)
            again = trained(name, lambda tensor, shape=shape: sharded(tensor, shape), 0, state=state)[1]
            found[name, shape] = (
                {key: whole(value) for key, value in model.values.items()},
                states(state), states(gather_state(again.state_dict(), again, keep=True)),
            )  # fmt: skip
    found["bfloat16"] = {
        key: whole(value)
        for key, value in trained("sgd", lambda t: sharded(t, (2,)), 3, torch.bfloat16)[0].values.items()
    }
    return found


def states(state):
    """Return the tensors of a state as arrays."""
    return {
        (key, name): value.numpy()
        for key, entry in state["state"].items() for name, value in entry.items() if isinstance(value, torch.Tensor)
    }  # fmt: skip


@pytest.fixture(scope="module")
def on_two():
    return on_ranks(updates)[0]


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if "bit" not in name])
def test_updates_and_state_are_those_of_whole_weights(on_two, name):
    model, optimizer = trained(name, lambda tensor: tensor, 3)
    for weights, state, again in [found for key, found in on_two.items() if key[0] == name]:
        for key, value in model.values.items():
            torch.testing.assert_close(torch.from_numpy(weights[key]), value.detach(), rtol=1e-5, atol=1e-6)
        expected = states(optimizer.state_dict())
        assert state.keys() == again.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(torch.from_numpy(state[key]), torch.from_numpy(value), rtol=1e-4, atol=1e-6)
            assert (again[key] == state[key]).all()


@pytest.mark.parametrize(("name", "rel"), [("adamw8bit", 0.02), ("adamw4bit", 0.3)])
def test_few_bits_are_the_same_codes_before_and_after_shards(on_two, name, rel):
    """Blocks of the matrix lie on one device; those of the vector are cut at element 2,500."""
    model, optimizer = trained(name, lambda tensor: tensor, 3)
    for weights, state, again in [found for key, found in on_two.items() if key[0] == name]:
        assert state.keys() == again.keys() == states(optimizer.state_dict()).keys()
        for (key, part), value in state.items():
            if part.endswith("codes"):
                assert value.shape == optimizer.state_dict()["state"][key][part].shape
                changed = (again[key, part] != value).mean()
                assert (
                    changed == 0
                    if value.shape[0] == 100 * 256 // (value.shape[1] * 8 // int(name[5]))
                    else changed < rel
                )
        moved = torch.from_numpy(weights["matrix"]) - tensors(0)["matrix"]
        expected = model.values["matrix"].detach() - tensors(0)["matrix"]
        assert (moved - expected).norm() < rel * expected.norm()


def test_bfloat16_weights_are_rounded_at_random_by_their_place(on_two):
    model, _ = trained("sgd", lambda tensor: tensor, 3, torch.bfloat16)
    exact = {key: value.double() for key, value in tensors(0, torch.bfloat16).items()}
    for step in range(3):
        for key, gradient in tensors(step + 1, torch.bfloat16).items():
            exact[key] = exact[key] - 0.01 * gradient.double()
    for key in ("matrix", "vector"):
        error = torch.from_numpy(on_two["bfloat16"][key]).double() - exact[key]
        ours = model.values[key].detach().double() - exact[key]
        assert error.abs().mean() < 1.2 * ours.abs().mean()
        assert error.mean().abs() < 4 * error.std() / error.numel() ** 0.5
        assert not torch.equal(error[: len(error) // 2], error[len(error) // 2 :])


def masks(rank):
    """Return for each scope the whole mask and share of zeros; of weights with many ties, and of signed scores."""
    found = {}
    for number, (scope, sparsity, size) in enumerate(SCOPES):
        for signed in (False, True):
            weights = {key: sharded(value, (2,)) for key, value in tied().items()}
            kept = make_masks(weights, sparsity, scope, size, signed=signed)
            whole_masks = {
                key: from_own(mask, weights[key], weights[key].shape).full_tensor().numpy()
                for key, mask in kept.items()
            }
            apply_masks(weights, kept)
            found[number, signed] = whole_masks, sparsity_of(weights)
    scores = {key: torch.zeros_like(value) for key, value in weights.items()}
    for value in weights.values():
        value.grad = value.clone()
    add_movement(scores, weights)
    found["movement"] = {key: whole(value) for key, value in scores.items()}
    found["starts"] = {key: (own_start(value), own(value).numel()) for key, value in weights.items()}
    return found


def tied():
    """Weights of few values, so that many are equal."""
    return {key: (tensors(7)[key] * 3).round() / 3 for key in ("matrix", "short")} | {
        "small": tensors(8)["matrix"][:12]
    }


def test_masks_are_those_of_whole_weights():
    first, second = on_ranks(masks)
    for number, (scope, sparsity, size) in enumerate(SCOPES):
        for signed in (False, True):
            weights = tied()
            expected = make_masks(weights, sparsity, scope, size, signed=signed)
            apply_masks(weights, expected)
            for found, zeros in (first[number, signed], second[number, signed]):
                assert zeros == sparsity_of(weights)
                for key, mask in expected.items():
                    assert (found[key] == mask.numpy()).all(), (scope, signed, key)
    for key, value in weights.items():
        torch.testing.assert_close(torch.from_numpy(first["movement"][key]), -(value**2))
        assert first["starts"][key] == (0, value.numel() // 2)
        assert second["starts"][key] == (value.numel() // 2, value.numel() // 2)
