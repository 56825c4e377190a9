import json

import pytest
import torch

from leanbert.errors import UserError
from leanbert.models.weights import load_pickled, read_checkpoint, read_folder, read_json


class Bomb:
    """Unpickling this writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_weights_is_not_run(tmp_path, legacy):
    reason = r"pytorch_model\.bin: damaged[^\n]*$" if legacy else r"could execute code; refused[^\n]*$"
    bomb = {"weight": Bomb(tmp_path / "ran")}
    torch.save(bomb, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match=reason):
        read_folder(tmp_path)
    with pytest.raises(UserError, match=reason):
        read_checkpoint(tmp_path / "pytorch_model.bin")
    assert not (tmp_path / "ran").exists()


def test_old_and_new_files_of_torch_are_read(tmp_path):
    for legacy in (False, True):
        path = tmp_path / f"{legacy}.bin"
        torch.save({"a": torch.arange(3)}, path, _use_new_zipfile_serialization=not legacy)
        assert load_pickled(path, "Fix it.")["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_damaged_weights_are_named(tmp_path, name):
    path = tmp_path / name
    for content in (b"", b"nonsense", b"\x80\x02}"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"^[^\n]*{name}: [^\n]*$"):
            read_folder(tmp_path)


def test_a_cut_checkpoint_is_named(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {"model.a": torch.zeros(10_000)}}, path)
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(UserError, match=r"last\.ckpt: [^\n]*$"):
        read_checkpoint(path)


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no model\.safetensors or pytorch_model\.bin in it"):
        read_folder(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    index = {"weight_map": {"a": "../../model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=rf"^{tmp_path}/model-00001-of-00001\.safetensors: no such file"):
        read_folder(tmp_path)


def test_a_foreign_checkpoint_is_named(tmp_path):
    path = tmp_path / "other.ckpt"
    for content in ({"state_dict": {}}, {"leanbert": {"encoder": {"wings": 2}}, "state_dict": {}}, [1]):
        torch.save(content, path)
        with pytest.raises(UserError, match=r"other\.ckpt: not a LeanBERT checkpoint"):
            read_checkpoint(path)
    with pytest.raises(UserError, match=r"none\.ckpt: no such checkpoint or folder"):
        read_checkpoint(tmp_path / "none.ckpt")


def test_broken_json_is_named_with_its_line(tmp_path):
    path = tmp_path / "config.json"
    for content, message in ((b'{\n"a": 1,\n}', ":3: broken JSON"), (b"[1]", ":1: not a JSON"), (b"\xff", "read")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"config\.json[^\n]*{message}"):
            read_json(path)
    with pytest.raises(UserError, match=r"none\.json: no such file"):
        read_json(tmp_path / "none.json")
