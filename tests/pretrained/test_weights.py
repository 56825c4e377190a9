import json

import pytest
import torch
from safetensors.torch import save_file

from leanbert.errors import UserError
from leanbert.pretrained.weights import read_checkpoint, read_folder
from leanbert.untrusted import load_pickled, read_json


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
    with pytest.raises(UserError, match=r"none\.ckpt: no such checkpoint or folder\. .* hf download"):
        read_checkpoint(tmp_path / "none.ckpt")


def test_broken_json_is_named_with_its_line(tmp_path):
    path = tmp_path / "config.json"
    for content, message in ((b'{\n"a": 1,\n}', ":3: broken JSON"), (b"[1]", ":1: not a JSON"), (b"\xff", "read")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"config\.json[^\n]*{message}"):
            read_json(path)
    with pytest.raises(UserError, match=r"none\.json: no such file"):
        read_json(tmp_path / "none.json")


def index_of(folder, weight_map, **files):
    """Write shards, which hold weights by name, and their index."""
    for name, weights in files.items():
        save_file(
            {weight: torch.full((2,), value) for weight, value in weights.items()}, folder / f"{name}.safetensors"
        )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("weight_map", [None, [], "a", 3, {"a": 3}, {"a": None}, {"a": ["x"]}, {"a": ""}, {"a": "/"}])
def test_an_index_of_another_form_is_named(tmp_path, weight_map):
    index_of(tmp_path, weight_map)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json:1: no weight_map from weights to names"):
        read_folder(tmp_path)


def test_a_shard_holds_what_the_index_says(tmp_path):
    index_of(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"}, one={"a": 1.0, "b": 9.0}, two={"b": 2.0})
    assert {name: tensor.tolist() for name, tensor in read_folder(tmp_path).items()} == {"a": [1, 1], "b": [2, 2]}
    index_of(tmp_path, {"a": "one.safetensors", "c": "two.safetensors"})
    with pytest.raises(UserError, match=rf"^{tmp_path}/two\.safetensors: lacks c, which model\.safetensors"):
        read_folder(tmp_path)


def test_json_that_is_too_deep_or_has_too_many_digits_is_named(tmp_path):
    path = tmp_path / "config.json"
    for content in ("[" * 100_000, '{"a": ' * 100_000, f'{{"hidden_size": {"9" * 10_000}}}'):
        path.write_text(content)
        with pytest.raises(UserError, match=r"^[^\n]*config\.json[^\n]*Copy the file again$"):
            read_json(path)


def test_pointers_of_git_lfs_are_told(tmp_path):
    for name in ("pytorch_model.bin", "run.ckpt"):
        path = tmp_path / name
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 440473133\n")
        with pytest.raises(UserError, match=rf"^{path}: a git-lfs pointer, not the file\. Run git lfs pull"):
            load_pickled(path, "Fix it.")


def test_settings_of_a_checkpoint_are_checked_with_its_name(tmp_path):
    path = tmp_path / "odd.ckpt"
    for encoder in ({"num_layers": 10**9}, {"hidden_size": "wide"}, {"preset": ["bert"]}):
        torch.save({"leanbert": {"encoder": encoder}, "state_dict": {}}, path)
        with pytest.raises(UserError, match=rf"^{path}: model\.encoder\.{min(encoder)}: "):
            read_checkpoint(path)
