"""Models that are made over several ranks: the same weights as on one, and what each rank allocates for them."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from leanbert import checkpoints
from leanbert.compression.structured import prune_structured
from leanbert.distributed.parallelize import parallelize
from leanbert.distributed.shard_writing import ShardWriting
from leanbert.distributed.sharding import pretend_group
from leanbert.distributed.spread import Spread
from leanbert.distributed.state import blank_shards
from leanbert.measure.counters import peak_rss_bytes
from leanbert.measure.trace import LiveBytes
from leanbert.memory.allocator import return_freed_pages
from leanbert.models.seq2seq import Seq2SeqModel
from leanbert.models.stored import ModelMetadata
from leanbert.pretrained.build import build_model
from leanbert.pretrained.huggingface.convert import write_huggingface
from leanbert.pretrained.sparse import write_sparse
from tests.distributed.ranks import on_ranks
from tests.pretrained.test_build import save_checkpoint
from tests.tiny import tiny_config

TOKENS = 100
RANKS = 3
"""Most tensors here have rows that three ranks cannot share evenly, and some have fewer."""


def build(make=None, init_from=None, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        config, given = tiny_config(**changes), {} if make is None else {"make": make}
        return build_model(config, TOKENS, **given, init_from=init_from)
    finally:
        torch.set_default_dtype(torch.float32)


def translator(config):
    return Seq2SeqModel(config, 3, "encoder", copy=True)


def changed():
    """Make a model of which somebody changes what `build_model` returns, and reads it for that."""
    model = build()
    norm, dense = model.head.norm, model.head.dense
    with torch.no_grad():
        model.encoder.blocks[0].attention.output.weight[3:7, ::2] = torch.arange(16.0)
        dense.weight.mul_(1 + dense.weight.std().item()).add_(torch.rand_like(dense.weight))
        norm.weight.copy_(torch.linspace(0, 1, 32, device=norm.weight.device) @ dense.weight.mT)
        norm.weight[dense.weight.argmax(1)] = 3.0
    model.encoder.final_norm.bias = nn.Parameter(torch.randn(32))
    return model


def prune(model):
    prune_structured(model, 1, 40)


def keep(model):
    pass


def cases(folder):
    """Return by name what makes a model, and what comes after."""
    return {
        "modern": (build, keep),
        "bert, pruned": (partial(build, preset="bert", hidden_size=48), prune),
        "sinusoidal, bf16": (partial(build, dtype=torch.bfloat16, position="sinusoidal"), keep),
        "changed, pruned": (changed, prune),
        "checkpoint": (partial(build, init_from=folder / "a.ckpt"), prune),
        "shards": (partial(build, init_from=folder / "shards.ckpt"), keep),
        "sparse": (partial(build, init_from=folder / "sparse"), keep),
        "huggingface": (partial(build, init_from=folder / "huggingface"), keep),
        "decoder": (partial(build, translator, folder / "huggingface"), keep),
    }


def tensors_of(model):
    named = (*model.named_parameters(), *model.named_buffers())
    whole = {name: each.full_tensor() if isinstance(each, DTensor) else each for name, each in named}
    return {name: tensor.detach().float().numpy() for name, tensor in whole.items()}


def made_on(folder, rank):
    mesh = init_device_mesh("cpu", (RANKS,))
    checkpoint = checkpoints.load_pickled(folder / "a.ckpt", "")
    weights = checkpoint["state_dict"].items()
    checkpoint["state_dict"] = {
        name: distribute_tensor(each, mesh, blank_shards(each, mesh).placements) for name, each in weights
    }
    ShardWriting(checkpoints.save).start(checkpoint, folder / "shards.ckpt", mesh, lambda size: False)
    return {name: tensors_of(parallelize(*case, mesh)) for name, case in cases(folder).items()}


@pytest.mark.slow
def test_weights_are_those_of_one_device_however_they_come_about(tmp_path):
    source = build(preset="bert", position="learned")
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(torch.randn_like(parameter)).mul_(torch.rand_like(parameter) > 0.5)
    save_checkpoint(tmp_path / "a.ckpt", source)
    write_huggingface(source, tmp_path / "huggingface")
    write_sparse(source, tmp_path / "sparse", ModelMetadata("mlm"))
    ranks = on_ranks(partial(made_on, tmp_path), RANKS)
    for name, (make, prepare) in cases(tmp_path).items():
        model = make()
        prepare(model)
        expected = tensors_of(model)
        for found in ranks:
            assert found[name].keys() == expected.keys()
            for weight, values in expected.items():
                assert found[name][weight].tobytes() == values.tobytes(), (name, weight)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("preset", ["modern", "bert"])
def test_a_rank_allocates_its_shards_and_one_tensor(preset, ranks):
    make = partial(build, preset=preset, hidden_size=64, num_heads=8, intermediate_size=160, type_vocab_size=8)
    whole = {name: tensor.nbytes for name, tensor in make().named_parameters()}
    with pretend_group(ranks) as mesh, LiveBytes(nn.Module()) as trace:
        model = parallelize(make, keep, mesh)
        held = sum(storage.size_bytes for storage in trace.live())
    assert held == sum(whole.values()) // ranks
    bias = whole["head.bias"]  # torch.zeros makes it, so it is whole until the model is sharded
    more = trace.timeline().peak_bytes - held - (bias - bias // ranks) - max(whole.values())
    assert 0 <= more <= (1000 if preset == "bert" else 0)  # the sines by which first heads look at neighbours
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())


def rise(rank):
    """Return by how many bytes this process's resident memory rises at most while a model is made, and the sizes."""
    return_freed_pages()
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is what is resident now
    before, mesh = peak_rss_bytes(), init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    model = parallelize(partial(build, num_layers=8, hidden_size=1024, num_heads=16), keep, mesh)
    return peak_rss_bytes() - before, [parameter.nbytes for parameter in model.parameters()]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resident_memory_is_linear_in_the_inverse_of_the_ranks():
    for ranks in (2, 4):
        for found, sizes in on_ranks(rise, ranks):
            assert sum(sizes) > 400e6
            assert 0 <= found - sum(sizes) / ranks - max(sizes) < 40e6  # 28 to 31 MB: what a first time takes


def test_what_nothing_was_spread_for_is_as_outside():
    with pretend_group(2) as mesh, Spread(mesh):
        with torch.device("meta"):
            weight = nn.Linear(3, 4).weight
        assert weight.is_meta
        assert torch.arange(3).tolist() == [0, 1, 2]
        before = torch.get_rng_state()
        weight.data.normal_()
        assert torch.equal(torch.get_rng_state(), before)
