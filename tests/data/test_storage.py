from __future__ import annotations

import errno
from pathlib import Path

import pytest

from leanbert.data.storage import explain_disk_errors, locked, replaced_folder, write_text_atomically
from leanbert.errors import UserError


def leave_half(folder: Path) -> None:
    (folder / "half").write_text("x")
    raise ZeroDivisionError


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "cache"
    (tmp_path / "cache.tmp-dead").mkdir()
    with pytest.raises(ZeroDivisionError), replaced_folder(target) as building:
        leave_half(building)
    assert list(tmp_path.iterdir()) == []
    with replaced_folder(target) as building:
        (building / "whole").write_text("x")
        assert not target.exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["cache", "whole"]


@pytest.mark.parametrize(
    ("code", "message"), [(errno.ENOSPC, "disk is full"), (errno.EFBIG, "disk is full"), (errno.EROFS, "cannot be")]
)
def test_disk_errors_become_one_line(tmp_path: Path, code: int, message: str) -> None:
    with pytest.raises(UserError, match=rf"{message}.*--data\.cache_dir") as caught, explain_disk_errors(tmp_path):
        raise OSError(code, "why")
    assert str(tmp_path) in str(caught.value)


def test_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), explain_disk_errors(tmp_path):
        (tmp_path / "none").read_text()


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"--data\.cache_dir"), locked(tmp_path / "file" / "cache"):
        pass


def test_text_is_replaced_atomically(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    write_text_atomically(path, "ä\n")
    write_text_atomically(path, "ö\n")
    assert path.read_bytes() == "ö\n".encode()
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]
