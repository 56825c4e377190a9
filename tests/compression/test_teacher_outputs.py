import shutil
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from leanbert.compression.teacher_outputs import forget_weights, make_outputs
from leanbert.errors import UserError
from leanbert.models.pointer import Copied

ROWS = 7


def values():
    """Of each row, in three dtypes."""
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(ROWS, *shape, generator=generator) for name, shape in (("h", (3, 4)), ("p", (3, 2)))}
    ids = torch.randint(0, 99, (ROWS, 2), generator=generator)
    return {"hidden": drawn["h"].bfloat16(), "copied": Copied(drawn["p"].double(), drawn["p"][..., 0], ids)}


def of_rows(numbers):
    found = values()
    return {"hidden": found["hidden"][numbers], "copied": Copied(*(part[numbers] for part in found["copied"]))}


class Batch(SimpleNamespace):
    """What is asked of a batch whose rows are known."""

    inputs = SimpleNamespace(input_ids=torch.zeros(1))

    def __len__(self):
        return len(self.row_numbers)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "teachers/digest"


def test_rows_are_read_as_they_were_written_in_any_order(folder):
    asked = []
    for _ in range(2):  # the second time they are there
        kept = make_outputs(folder, ROWS, 3, lambda numbers: asked.append(len(numbers)) or of_rows(numbers))
    assert asked == [3, 3, 1]
    rows = [5, 0, 6, 5]
    found, expected = kept.read(Batch(row_numbers=rows)), of_rows(rows)
    assert found.keys() == expected.keys()
    for one, other in zip((found["hidden"], *found["copied"]), (expected["hidden"], *expected["copied"]), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    size = ROWS * (12 * 2 + 6 * 8 + 3 * 4 + 2 * 8)
    assert sum(file.stat().st_size for file in folder.glob("*.bin")) == size


def test_without_copies_there_are_none(folder):
    kept = make_outputs(folder, ROWS, 4, lambda numbers: {**of_rows(numbers), "copied": None})
    assert kept.read(Batch(row_numbers=[1]))["copied"] is None


def test_an_interrupted_teacher_leaves_nothing(folder):
    def stops(numbers):
        if numbers[0] >= 3:
            raise KeyboardInterrupt
        return of_rows(numbers)

    with pytest.raises(KeyboardInterrupt):
        make_outputs(folder, ROWS, 3, stops)
    assert not [path for path in folder.parent.iterdir() if path.suffix != ".lock"]
    asked = []
    make_outputs(folder, ROWS, 3, lambda numbers: asked.append(len(numbers)) or of_rows(numbers))
    assert sum(asked) == ROWS


def test_a_disk_without_the_room_is_refused_before_anything_is_written(folder, monkeypatch, capsys):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(699))
    message = (
        r"^model\.distillation\.cache: the teacher's outputs for 7 rows take 700 B, but the disk of .*teachers has "
        r"699 B free\. Free some space, choose another disk with --data\.cache_dir, or leave it out$"
    )
    with pytest.raises(UserError, match=message):
        make_outputs(folder, ROWS, 3, of_rows)
    assert not folder.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(700))
    make_outputs(folder, ROWS, 3, of_rows)
    assert capsys.readouterr().err == f"teacher     runs over 7 rows; its outputs take 700 B in {folder}\n"


def test_a_file_that_was_cut_or_removed_is_an_error(folder):
    kept = make_outputs(folder, ROWS, 3, of_rows)
    with (folder / "hidden.bin").open("rb+") as file:
        file.truncate(24 * 6)
    kept.read(Batch(row_numbers=[5]))
    with pytest.raises(UserError, match=r"hidden\.bin: ends before this row\. Start again"):
        kept.read(Batch(row_numbers=[6]))
    (folder / "hidden.bin").unlink()
    with pytest.raises(UserError, match=r"hidden\.bin: No such file or directory\. Start again"):
        kept.read(Batch(row_numbers=[5]))


def test_forgotten_weights_keep_their_shape_and_what_shares_them():
    shared = nn.Linear(4, 4)
    model = nn.ModuleList([nn.Sequential(shared, nn.LayerNorm(4)), shared, nn.Linear(4, 2)])
    count = sum(weight.numel() for weight in model.parameters())
    forget_weights(model, model[2].parameters())
    assert model[0][0].weight is model[1].weight
    assert sum(weight.numel() for weight in model.parameters()) == count
    assert [name for name, weight in model.named_parameters() if weight.device.type == "cpu"] == ["2.weight", "2.bias"]
