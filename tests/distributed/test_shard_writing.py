"""Checkpoints in shards as four ranks write them: what they hold, how they are read, and what damage does to them."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import distribute_tensor

from leanbert import checkpoints, shard_files
from leanbert.distributed import shard_writing
from leanbert.distributed.shard_writing import ShardWriting
from leanbert.distributed.sharding import lay_out
from leanbert.distributed.state import blank_shards, decoded_state
from leanbert.errors import UserError
from leanbert.files import REST
from leanbert.optim.adamw import SlicedAdamW
from leanbert.pretrained.weights import read_checkpoint
from tests.distributed.ranks import on_ranks

pytestmark = pytest.mark.slow

FOLDER = "LEANBERT_TEST_FOLDER"
RANKS = 4


def whole_tensors():
    """Of several types, with rows that four ranks cannot share evenly, or of which some have none."""
    generator = torch.Generator().manual_seed(0)
    return {
        "model.even": torch.randn(8, 5, generator=generator),
        "model.uneven": torch.randn(6, 3, generator=generator).bfloat16(),
        "model.one": torch.randn(1, 4, generator=generator).double(),
        "model.mask": torch.randn(7, generator=generator) > 0,
        "model.codes": torch.arange(9, dtype=torch.uint8),
    }


def checkpoint(tensors):
    return {
        "leanbert": {"task": "mlm"}, "global_step": 3, "state_dict": dict(tensors), "callbacks": {"B{'a': 1}": [1, 2]},
        "optimizer_states": [{"state": {0: {"exp_avg": tensors["model.even"], "step": torch.tensor(3.0)}}}],
        "lr_schedulers": [],
    }  # fmt: skip


def spread(tensors, mesh):
    return {
        name: distribute_tensor(tensor, mesh, blank_shards(tensor, mesh).placements) for name, tensor in tensors.items()
    }


def read_by_ranks(path, mesh):
    return checkpoints.fill(path, checkpoints.read(path), partial(blank_shards, mesh=mesh))


# ---- on each rank; what is found is a name and whether it is so


def write(rank):
    folder, tensors = Path(os.environ[FOLDER]), whole_tensors()
    meshes = {groups: lay_out("cpu", RANKS, groups) for groups in (1, 2)}
    writing = ShardWriting(checkpoints.save)
    for groups, mesh in meshes.items():
        writing.start(checkpoint(spread(tensors, mesh)), folder / f"groups-{groups}.ckpt", mesh, lambda size: False)
    kept = spread(tensors, meshes[1])
    writing.start(checkpoint(kept), folder / "copied.ckpt", meshes[1], lambda size: size > 0)
    for tensor in kept.values():  # training goes on
        tensor.zero_()
    found = {"in the background": writing.pending}
    writing.finish()
    for mesh, name in ((meshes[2], "groups-1"), (meshes[1], "groups-2")):
        filled = read_by_ranks(folder / f"{name}.ckpt", mesh)["state_dict"]
        for key, tensor in spread(tensors, mesh).items():
            found[f"{name} {key}"] = torch.equal(filled[key].to_local(), tensor.to_local())
            found[f"{name} {key} placed"] = filled[key].placements == tensor.placements
    return found | full_disk(rank, writing, kept, meshes[1], folder) | few_bits(meshes[1], folder)


def full_disk(rank, writing, tensors, mesh, folder):
    def fail(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        if rank == 2:
            patch.setattr(shard_writing.os, "fsync", fail)
        writing.start(checkpoint(tensors), folder / "full.ckpt", mesh, lambda size: True)
        with pytest.raises(UserError) as error:
            writing.finish()
    writing.finish()
    return {str(error.value): "the disk is full" in str(error.value), "once": not writing.pending}


def few_bits(mesh, folder):
    """Moments in 8 bits come back with the codes that they had."""
    weight = spread({"weight": torch.linspace(-1, 1, 8192).view(256, 32)}, mesh)["weight"].requires_grad_()
    weight.grad = weight.detach() ** 3
    optimizer, again = (SlicedAdamW([weight], state_bits=8) for _ in range(2))
    optimizer.step()
    state, path = decoded_state(optimizer.state_dict(), optimizer), folder / "bits.ckpt"
    saved = {**checkpoint(whole_tensors()), "optimizer_states": [state]}
    ShardWriting(checkpoints.save).start(saved, path, mesh, lambda size: False)
    again.load_state_dict(read_by_ranks(path, mesh)["optimizer_states"][0])
    before, after = optimizer.state[weight], again.state[weight]
    found = {
        name: torch.equal(before[name], after[name]) or torch.allclose(before[name], after[name], rtol=2e-7, atol=0)
        for name in before
        if name.startswith("exp_avg")
    }
    return found | {"state": before.keys() == after.keys(), "codes": len(found) == 4}


# ---- what they leave


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER, str(folder))
        for rank, found in enumerate(on_ranks(write, RANKS)):
            wrong = [name for name, right in found.items() if not right]
            assert not wrong, (rank, wrong)
            assert len(found) == 29
    assert sorted(os.listdir(folder)) == ["bits.ckpt", "copied.ckpt", "groups-1.ckpt", "groups-2.ckpt"]
    return folder


@pytest.fixture
def path(written, tmp_path):
    return Path(shutil.copytree(written / "groups-1.ckpt", tmp_path / "step-00000003.ckpt"))


def rewrite(path, **changes):
    """Change entries of the rest, whose tensors are mapped to the file."""
    kept = torch.load(path / REST, weights_only=False)
    torch.save({**kept, **changes}, path / "new")
    os.replace(path / "new", path / REST)


@pytest.mark.parametrize("name", ["groups-1", "groups-2", "copied"])
def test_one_process_reads_all_bit_by_bit(written, name):
    path, expected = written / f"{name}.ckpt", checkpoint(whole_tensors())
    assert checkpoints.is_whole(path)
    assert checkpoints.step_of(path) == 3
    loaded = checkpoints.load(path)
    assert loaded["state_dict"].keys() == expected["state_dict"].keys()
    for key, tensor in expected["state_dict"].items():
        assert loaded["state_dict"][key].dtype == tensor.dtype
        assert torch.equal(loaded["state_dict"][key], tensor), key
    [state], [wanted] = loaded["optimizer_states"], expected["optimizer_states"]
    assert torch.equal(state["state"][0]["exp_avg"], wanted["state"][0]["exp_avg"])
    assert state["state"][0]["step"] == 3
    assert loaded["callbacks"] == expected["callbacks"]


def test_weights_that_are_read_one_by_one_are_looked_for_once(path, monkeypatch):
    rewrite(path, leanbert={"task": "mlm", "encoder": {}})
    looked, kind = [], shard_files.dcp.HuggingFaceStorageReader
    read = kind.read_metadata
    monkeypatch.setattr(kind, "read_metadata", lambda self: looked.append(1) or read(self))
    weights = read_checkpoint(path).read_weights()
    expected = whole_tensors()
    assert {f"model.{name}" for name in weights} == expected.keys()
    assert all(torch.equal(weights[name], expected[f"model.{name}"]) for name in weights)
    assert len(looked) == 1


def test_a_rank_that_is_lost_while_shards_are_read_is_no_damage(path, monkeypatch):
    def lose(*_, **__):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")

    monkeypatch.setattr(shard_files.dcp, "load", lose)
    with pytest.raises(RuntimeError, match="closed by peer"):
        checkpoints.load(path)


def test_each_part_is_written_once(written):
    """40 + 40 numbers of 4 bytes, 18 of 2, 4 of 8, 7 and 9 of one; replicas share the work."""
    for name in ("groups-1.ckpt", "groups-2.ckpt"):
        files = [shard_files.dcp.HuggingFaceStorageReader(str(written / name)).read_metadata()]
        parts = [chunk for metadata in files for each in metadata.state_dict_metadata.values() for chunk in each.chunks]
        assert sum(torch.Size(part.sizes).numel() for part in parts) == 40 + 40 + 18 + 4 + 7 + 9
        assert len(list((written / name).glob("*.safetensors"))) == RANKS
    alone = {file.stat().st_size for file in (written / "groups-2.ckpt").glob("*.safetensors")}
    assert max(alone) < 1000


def test_a_missing_cut_changed_or_added_file_is_damage(path):
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        file.unlink()
        assert not checkpoints.is_whole(path), file
        file.write_bytes(content[:-1])
        assert checkpoints.step_of(path) is None, file
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        assert checkpoints.is_whole(path) == (file.name == REST), file  # the middle of a zip may be padding
        file.write_bytes(content)
    assert checkpoints.is_whole(path)
    (path / "more.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"more\.safetensors: damaged.*--ckpt_path last"):
        checkpoints.load(path)


def test_changed_bytes_are_noticed_where_all_sums_are_wanted(path):
    file = path / "00002.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert checkpoints.read(path, all_sums=False)["global_step"] == 3
    with pytest.raises(UserError, match=r"00002\.safetensors: damaged"):
        checkpoints.read(path)


def test_nothing_in_the_folder_is_executed(path, monkeypatch):
    class Bomb:
        def __reduce__(self):
            return os.system, ("touch bomb",)

    monkeypatch.chdir(path.parent)
    shard = next(path.glob("*.safetensors"))
    files, whole = checkpoints.read(path)["shards"], (path / REST).read_bytes()
    (path / ".metadata").write_bytes(pickle.dumps(Bomb()))
    assert checkpoints.load(path)["global_step"] == 3
    rewrite(path, bomb=Bomb())
    with pytest.raises(UserError, match="could execute code"):
        checkpoints.load(path)
    (path / REST).write_bytes(whole)
    shard.write_bytes(pickle.dumps(Bomb()))
    rewrite(path, shards={**files, shard.name: [shard.stat().st_size, 0]})
    with pytest.raises(UserError, match="damaged"):
        checkpoints.fill(path, checkpoints.read(path, all_sums=False))
    assert not Path("bomb").exists()


@pytest.mark.parametrize("table", [None, 3, [], {"00000.safetensors": "x"}, {"00000.safetensors": [torch.ones(2), 0]}])
def test_a_rest_that_does_not_know_its_shards_is_damaged(path, table):
    rewrite(path, shards=table)
    with pytest.raises(UserError, match="damaged"):
        checkpoints.read(path)


def test_what_is_held_is_not_removed(path):
    other = Path(shutil.copytree(path, path.with_name("step-00000004.ckpt")))
    assert checkpoints.hold(path)
    for each in (path, other):
        checkpoints.remove(each)
    assert os.listdir(path.parent) == [path.name]
    assert checkpoints.is_whole(path)
    assert not checkpoints.hold(other)
