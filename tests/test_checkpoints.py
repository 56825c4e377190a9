import os
import pickle
import signal

import pytest
import torch

from leanbert import checkpoints
from leanbert.errors import UserError

WHOLE = {"leanbert": {"task": "mlm"}, "state_dict": {"weight": torch.arange(5)}, "global_step": 3}


def test_round_trip_leaves_one_file(tmp_path):
    checkpoints.save(WHOLE, tmp_path / "a" / "x.ckpt")
    assert os.listdir(tmp_path / "a") == ["x.ckpt"]
    loaded = checkpoints.load(tmp_path / "a" / "x.ckpt")
    assert torch.equal(loaded["state_dict"]["weight"], WHOLE["state_dict"]["weight"])


def test_a_full_disk_keeps_the_older_file(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "x.ckpt"
    checkpoints.save(WHOLE, path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
        with pytest.raises(UserError, match=r"x\.ckpt: the disk is full.*default_root_dir"):
            checkpoints.save({**WHOLE, "big": torch.zeros(1 << 20)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == ["x.ckpt"]
    assert path.read_bytes() == before


def test_a_file_is_whole_if_it_loads_and_every_byte_of_its_records_is_there(tmp_path):
    """Any byte flipped, any cut: the file loads as it was, or is not whole."""
    path, damaged = tmp_path / "x.ckpt", tmp_path / "y.ckpt"
    checkpoints.save(WHOLE, path)
    content = path.read_bytes()
    assert checkpoints.is_whole(path)
    refused = 0
    for position in range(0, len(content), 3):
        flipped = bytearray(content)
        flipped[position] ^= 0xFF
        damaged.write_bytes(flipped)
        try:
            loaded = checkpoints.load(damaged)
        except UserError:
            refused += 1
        else:
            assert loaded["leanbert"] == WHOLE["leanbert"]
            assert torch.equal(loaded["state_dict"]["weight"], WHOLE["state_dict"]["weight"])
    assert refused > 300  # the rest is padding, times and names that nobody reads
    for length in range(0, len(content), 50):
        damaged.write_bytes(content[:length])
        assert not checkpoints.is_whole(damaged), length


@pytest.mark.parametrize("missing", ["leanbert", "state_dict", "global_step"])
def test_a_file_without_its_parts_is_not_whole(tmp_path, missing):
    torch.save({key: value for key, value in WHOLE.items() if key != missing}, tmp_path / "x.ckpt")
    assert not checkpoints.is_whole(tmp_path / "x.ckpt")
    torch.save({**WHOLE, missing: "x"}, tmp_path / "x.ckpt")
    assert not checkpoints.is_whole(tmp_path / "x.ckpt")
    assert checkpoints.step_of(tmp_path / "x.ckpt") is None


def test_neither_a_folder_nor_nothing_is_whole(tmp_path):
    assert not checkpoints.is_whole(tmp_path)
    assert not checkpoints.is_whole(tmp_path / "none.ckpt")
    (tmp_path / "empty.ckpt").touch()
    assert not checkpoints.is_whole(tmp_path / "empty.ckpt")


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch bomb",))


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({**WHOLE, "bomb": Bomb()}, "x.ckpt")
    with pytest.raises(UserError, match="could execute code"):
        checkpoints.load("x.ckpt")
    with open("y.ckpt", "wb") as file:
        pickle.dump(Bomb(), file)
    with pytest.raises(UserError, match=r"y\.ckpt: damaged, or no file"):
        checkpoints.load("y.ckpt")
    assert not (tmp_path / "bomb").exists()


def test_missing_cut_and_foreign_files(tmp_path):
    with pytest.raises(UserError, match="no such checkpoint"):
        checkpoints.load(tmp_path / "none.ckpt")
    checkpoints.save(WHOLE, tmp_path / "x.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "x.ckpt").read_bytes()[:300])
    with pytest.raises(UserError, match="damaged"):
        checkpoints.load(tmp_path / "cut.ckpt")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "foreign.ckpt")
    with pytest.raises(UserError, match="init_from"):
        checkpoints.load(tmp_path / "foreign.ckpt")


def test_the_mean_of_weights(tmp_path):
    generator = torch.Generator().manual_seed(0)
    paths, parts = [tmp_path / f"{index}.ckpt" for index in range(5)], []
    for index, path in enumerate(paths):
        shared = torch.randn(64, 3, generator=generator)
        state = {
            "shared": shared, "again": shared, "half": torch.randn(50, generator=generator).bfloat16(),
            "same": torch.full((7,), 0.1), "count": torch.tensor(index), "double": torch.tensor([index + 0.1]).double(),
        }  # fmt: skip
        parts.append(state)
        checkpoints.save({**WHOLE, "state_dict": state, "global_step": index, "optimizer_states": [1]}, path)
    mean = checkpoints.mean(paths)
    assert mean["global_step"] == 4
    assert "optimizer_states" not in mean
    assert {name: tensor.dtype for name, tensor in mean["state_dict"].items()} == {
        name: tensor.dtype for name, tensor in parts[0].items()
    }
    expected = {name: torch.stack([part[name].double() for part in parts]).mean(0) for name in parts[0]}
    found = mean["state_dict"]
    torch.testing.assert_close(found["shared"].double(), expected["shared"], rtol=0, atol=5e-7)
    assert (found["half"].double() - expected["half"]).abs().max() <= 2**-8 * expected["half"].abs().max()
    torch.testing.assert_close(found["double"], expected["double"], rtol=1e-15, atol=0)
    assert torch.equal(found["same"], parts[0]["same"])
    assert found["count"] == 4
    assert found["shared"].data_ptr() == found["again"].data_ptr()


def test_other_shapes_have_no_mean(tmp_path):
    for name, size in (("a", 3), ("b", 4)):
        checkpoints.save({**WHOLE, "state_dict": {"weight": torch.zeros(size)}}, tmp_path / f"{name}.ckpt")
    with pytest.raises(UserError, match=r"b\.ckpt: other weights than .*a\.ckpt"):
        checkpoints.mean([tmp_path / "a.ckpt", tmp_path / "b.ckpt"])
