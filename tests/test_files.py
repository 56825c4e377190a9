from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from leanbert.errors import UserError
from leanbert.files import (
    expand,
    explain_disk_errors,
    locked,
    remove_leftovers,
    replaced_folder,
    scratch_folder,
    temporary,
    write_text_atomically,
)


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
    with (
        pytest.raises(UserError, match=rf"{message}.* --data\.x$") as caught,
        explain_disk_errors(tmp_path, "--data.x"),
    ):
        raise OSError(code, "why")
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("folder", ["file/deep", "no/" + "n" * 300, "loop/x"])
def test_a_folder_that_cannot_be_made_is_named_in_one_line(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    target = tmp_path / folder
    message = r"cannot be written \(.+\)\. Choose another folder$"
    with pytest.raises(UserError, match=message), explain_disk_errors(target.parent), locked(target):
        pass
    with pytest.raises(UserError, match=message):
        write_text_atomically(target, "x")


def test_errors_about_other_files_pass(tmp_path: Path) -> None:
    for path in (tmp_path / "other" / "none", tmp_path / "other", tmp_path / "folders"):
        with pytest.raises(FileNotFoundError), explain_disk_errors(tmp_path / "folder"):
            path.read_text()


def test_who_holds_the_lock_removes_what_a_killed_process_left_and_nothing_else(tmp_path: Path) -> None:
    left = tmp_path / ".cache.tmp-0123abcd"
    left.mkdir()
    (left / "half").write_text("x")
    kept = {
        ".other.tmp-0123abcd",
        "cache.tmp-backup",
        "cache.tmp-0123abcd",
        ".cache.tmp-backup",
        ".cache.tmp-0123abcde",
    }
    for name in kept:
        (tmp_path / name).mkdir()
    with locked(tmp_path / "cache"), replaced_folder(tmp_path / "cache"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "cache", "cache.lock"}


def test_homes_are_found_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("~x").touch()
    assert expand("~x", "data.cache_dir") == Path("~x")
    assert expand("~/x", "data.cache_dir") == Path.home() / "x"
    assert expand("a/~b", "data.cache_dir") == Path("a/~b")
    for path in ("~nosuchuser/x", "", "a\0b"):
        with pytest.raises(UserError, match=r"^data\.cache_dir: [^\n]+$"):
            expand(path, "data.cache_dir")


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
