from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from leanbert.data.storage import (
    explain_disk_errors,
    locked,
    remove_leftovers,
    replaced_folder,
    scratch_folder,
    temporary,
    write_text_atomically,
)
from leanbert.errors import UserError


def leave_half(folder: Path) -> None:
    (folder / "half").write_text("x")
    raise ZeroDivisionError


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "cache"
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


def test_who_holds_the_lock_removes_what_was_left_half_written_and_nothing_else(
    tmp_path: Path,
) -> None:
    """A folder of the user's that only looks like it stays."""
    (tmp_path / ".cache.tmp-0123abcd").mkdir()
    (tmp_path / ".cache.tmp-0123abcd" / "half").write_text("x")
    kept = {".other.tmp-0123abcd", "cache.tmp-backup", ".cache.tmp-backup", ".cache.tmp-0123abcde"}
    for name in kept:
        (tmp_path / name).mkdir()
    with locked(tmp_path / "cache"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "cache.lock"}
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "cache.lock"} - {".other.tmp-0123abcd"}


def test_nothing_temporary_stays(tmp_path: Path) -> None:
    with temporary(tmp_path / "a") as path:
        path.write_text("x")
        os.replace(path, tmp_path / "a")
    with temporary(tmp_path / "a") as path:
        path.mkdir()
        (path / "half").write_text("x")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    with scratch_folder() as folder:
        (folder / "x").write_text("x")
    assert not folder.exists()


def test_what_is_no_regular_file_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_text_atomically(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "x"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_text_atomically(tmp_path / "pipe", "y")
    assert os.read(reader, 9) == b"y"
    os.close(reader)
