from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from leanbert import files as storage
from leanbert.data.mlm import MaskedLMData
from leanbert.data.samples.embedded import SYNTHETIC, embedded_files
from leanbert.data.store import cache as store
from leanbert.data.store import checksums
from leanbert.data.store.cache import made_once
from leanbert.data.store.examples import Notes, build_examples
from leanbert.errors import UserError
from tests.data.corpora import ENGLISH, sentences, write_corpus

VARIANTS = 250


def make(building: Path) -> dict[str, Any]:
    (building / "a").write_text("all of a")
    (building / "b").write_text("all of b")
    return {"count": 2}


# ---- damage


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, Any]]:
    """Return a function that reads all kinds of caches below `tmp_path / "cache"`, and so makes them."""
    corpus = str(write_corpus(tmp_path / "corpus.txt", sentences(ENGLISH, 60, length=12)))
    records = {part: [{"tokens": ["a", part], "labels": ["O", "O"]}] for part in ("train", "val", "test")}
    monkeypatch.setitem(SYNTHETIC, "srl", lambda: records)
    folder = tmp_path / "cache"
    settings = {"train_files": [corpus], "cache_dir": str(folder), "vocab_size": 150, "val_share": 0.2}

    def encode(notes: Notes) -> Iterator[dict[str, list[int]]]:
        yield from ({"ids": list(range(number)), "targets": [number]} for number in range(1, 20))
        notes.labels = ["yes", "no"]

    def read_all() -> dict[str, Any]:
        data = MaskedLMData(**settings)  # type: ignore[arg-type]
        data.prepare()
        found: dict[str, Any] = {"tokenizer": data.tokenizer.to_json()}
        for part, cache in data.caches.items():
            arrays = (cache.values("ids"), cache.offsets("ids"), cache.counts("ids"))
            found[part] = [cache.count, cache.size("ids"), cache.dtypes, *(array.tolist() for array in arrays)]
        dtypes = {"ids": "int32", "targets": "float32"}
        examples = build_examples(["key"], dtypes, {"ids": 20}, encode, folder, "data.train_files: no example")
        columns = [[examples.values(c).tolist(), examples.offsets(c).tolist()] for c in ("ids", "targets")]
        found["examples"] = [examples.count, examples.dtypes, examples.notes, columns]
        return found | {part: path.read_text() for part, path in embedded_files("srl", folder).items()}

    return read_all


def test_whatever_is_damaged_the_data_is_the_same(
    tmp_path: Path,
    read: Callable[[], dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(storage, "_flush_to_disk", lambda path: None)  # of what hundreds of builds write
    pristine = read()
    assert capsys.readouterr().err == ""
    generator = random.Random(7)
    told = 0
    for variant in range(VARIANTS):
        damage = hurt(tmp_path / "cache", generator)
        assert read() == pristine, (variant, damage)
        told += "is damaged (" in capsys.readouterr().err
    assert told > VARIANTS / 2  # the others hit the memory of digests, a lock, or gave back what was there
    assert read() == pristine
    assert capsys.readouterr().err == ""


def hurt(folder: Path, generator: random.Random) -> str:
    """Damage a file or folder of a cache in one of many ways, and say which."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock"]
    folders = [path for path in sorted(folder.glob("*/*")) if path.is_dir()]
    if generator.random() < 0.15:
        target, other = generator.sample(folders, 2)
        ways: list[Callable[..., None]] = [remove, empty, swap, loop, replace_by_file]
    else:
        target, other = generator.sample(files, 2)
        ways = [remove, empty, swap, loop, replace_by_folder, replace_by_pipe, link, copy, cut, extend, flip, flip]
        ways += [noise, *([retype] * 6 if target.suffix == ".json" else [])]
    way = generator.choice(ways)
    way(target, other, generator)
    return f"{way.__name__} {target} {other}"


def remove(target: Path, *_: object) -> None:
    shutil.rmtree(target) if target.is_dir() else target.unlink()


def empty(target: Path, *_: object) -> None:
    remove(target)
    target.touch() if target.suffix else target.mkdir()


def swap(target: Path, other: Path, *_: object) -> None:
    aside = target.with_name("aside")
    target.rename(aside)
    other.rename(target)
    aside.rename(other)


def loop(target: Path, *_: object) -> None:
    remove(target)
    target.symlink_to(target)


def replace_by_file(target: Path, *_: object) -> None:
    remove(target)
    target.write_text("{}")


def replace_by_folder(target: Path, *_: object) -> None:
    target.unlink()
    (target / "deep").mkdir(parents=True)


def replace_by_pipe(target: Path, *_: object) -> None:
    target.unlink()
    os.mkfifo(target)


def link(target: Path, other: Path, *_: object) -> None:
    target.unlink()
    target.symlink_to(other)


def copy(target: Path, other: Path, *_: object) -> None:
    shutil.copy2(other, target)


def cut(target: Path, _: Path, generator: random.Random) -> None:
    os.truncate(target, generator.randrange(max(1, target.stat().st_size)))


def extend(target: Path, _: Path, generator: random.Random) -> None:
    with target.open("ab") as file:
        file.write(generator.randbytes(generator.choice([1, 8, 4096])))


def flip(target: Path, _: Path, generator: random.Random) -> None:
    before = target.stat()
    data = bytearray(target.read_bytes()) or bytearray(1)
    data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    target.write_bytes(data)
    os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))


def noise(target: Path, _: Path, generator: random.Random) -> None:
    target.write_bytes(generator.randbytes(target.stat().st_size))


def retype(target: Path, _: Path, generator: random.Random) -> None:
    """Put a value of another type, or none, at some place of a JSON file."""
    try:
        value = json.loads(target.read_text())
    except ValueError:
        return
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            places.append((node, key))
            if isinstance(child, dict | list):
                walk(child)

    walk(value)
    if places:
        node, key = generator.choice(places)
        node[key] = generator.choice([None, "1", -1, 10**30, [], {}, [1], 1.5, True, "x" * 300, float("nan")])
        if generator.random() < 0.3:
            del node[key]
    target.write_text(json.dumps(value) if generator.random() < 0.9 else "[" * 100_000)


def test_what_was_checked_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "_SETTLED_NS", -1)
    folder = tmp_path / "kind" / "name"
    assert made_once(folder, make) == made_once(folder, make) == {"count": 2}
    with monkeypatch.context() as patch:
        patch.setattr(checksums, "file_digest", None)
        assert made_once(folder, make) == {"count": 2}
    time.sleep(0.02)  # a tick of the file system's clock
    flip(folder / "a", folder, random.Random(0))
    assert made_once(folder, make) == {"count": 2}
    assert (folder / "a").read_text() == "all of a"
    moved = (tmp_path / "kind").rename(tmp_path / "moved")  # is read again, and is the same
    monkeypatch.setattr(store, "replaced_folder", None)
    assert made_once(moved / "name", make) == {"count": 2}


def test_a_cache_that_can_only_be_read_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_once(tmp_path / "kind" / "name", make)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(checksums, "_SETTLED_NS", -1)
    monkeypatch.setattr(os, "replace", refuse)
    assert made_once(tmp_path / "kind" / "name", make) == {"count": 2}
    with pytest.raises(UserError, match=r"kind: cannot be written \(Permission denied\).* --data\.cache_dir$"):
        made_once(tmp_path / "kind" / "other", make)
    assert not [path for path in tmp_path.rglob("*") if ".tmp-" in path.name]


def test_who_reads_is_not_disturbed_while_it_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "kind" / "name"
    made_once(folder, make)
    faults: list[object] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            try:
                if (text := (folder / "a").read_text()) != "all of a":
                    faults.append(text)
            except OSError as error:
                faults.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(30):
        (folder / "b").write_text("all of ?")
        made_once(folder, make)
    done.set()
    reader.join()
    assert faults == []


# ---- several processes

PROGRAM = """
    import os, signal, sys, time
    from pathlib import Path
    from leanbert import files as storage, signals
    from leanbert.data.store.cache import made_once

    signals.install()  # an exception would be lost where it starts in a destructor
    storage.QUIET_SECONDS = 0.2
    name, how, log = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])

    def make(building):
        (building / "a").write_text("all of a")
        with log.open("a") as file:
            file.write(f"{os.getpid()}\\n")
        if how == "dies":
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60 if how == "sleeps" else 0.5)
        return {"count": 2}

    assert made_once(name, make) == {"count": 2}
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Return a function that starts a process which asks for a folder, given its name and how it is made."""
    started: list[subprocess.Popen[str]] = []

    def run(name: str, how: str = "well") -> subprocess.Popen[str]:
        command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(tmp_path / "kind" / name), how]
        started.append(subprocess.Popen([*command, str(tmp_path / "log")], stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def makers(folder: Path, number: int) -> list[int]:
    """Wait until so many have begun to make something, and return their process numbers."""
    log = folder / "log"
    limit = time.monotonic() + 30
    while not log.exists() or len(log.read_text().split()) < number:
        assert time.monotonic() < limit
        time.sleep(0.02)
    return [int(pid) for pid in log.read_text().split()]


def test_one_makes_and_the_others_wait(tmp_path: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    processes = [start("name") for _ in range(4)]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    (maker,) = makers(tmp_path, 1)
    for process, error in zip(processes, errors, strict=True):
        waits = f"Waiting for another process that makes {tmp_path / 'kind' / 'name'}\n"
        assert error in ([""] if process.pid == maker else ["", waits])
    assert any(errors)


def test_another_takes_over_from_one_that_is_killed(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    first = start("name", "dies")
    makers(tmp_path, 1)
    others = [start("name") for _ in range(2)]
    assert [process.wait(timeout=60) for process in (first, *others)] == [-signal.SIGKILL, 0, 0]
    assert len(makers(tmp_path, 2)) == 2
    assert sorted(path.name for path in (tmp_path / "kind").iterdir()) == ["name", "name.lock"]


def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_are_not(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    living = start("living", "sleeps")
    makers(tmp_path, 1)
    (unfinished,) = (tmp_path / "kind").glob(".living.tmp-*")
    made_once(tmp_path / "kind" / "one", make)
    assert [path.name for path in unfinished.iterdir()] == ["a"]
    living.kill()
    living.wait()
    made_once(tmp_path / "kind" / "two", make)
    assert not unfinished.exists()


def test_who_waits_can_be_interrupted(tmp_path: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    start("name", "sleeps")
    makers(tmp_path, 1)
    waiting = start("name")
    assert waiting.stderr is not None
    assert waiting.stderr.readline().startswith("Waiting for another process")
    waiting.send_signal(signal.SIGINT)
    assert waiting.wait(timeout=30) == 128 + signal.SIGINT


def test_whoever_is_killed_at_whatever_moment_the_others_have_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cold, warm and damaged, with three processes at the same moment of which one or two are killed."""
    monkeypatch.setattr(storage, "QUIET_SECONDS", 60)
    folder, generator = tmp_path / "kind" / "name", random.Random(3)

    def make_slowly(building: Path) -> dict[str, Any]:
        for name in "ab":
            (building / name).write_text(f"all of {name}")
            time.sleep(0.005)
        return {"count": 2}

    def ask() -> int:
        """Return the number of a process that asks for the folder, and ends with 0 if it gets all of it."""
        if (child := os.fork()) != 0:
            return child
        try:
            whole = made_once(folder, make_slowly) == {"count": 2}
            os._exit(0 if whole and [(folder / name).read_text() for name in "ab"] == ["all of a", "all of b"] else 1)
        finally:
            os._exit(2)

    for state in [generator.choice(["cold", "warm", "damaged"]) for _ in range(25)]:
        if state == "cold":
            shutil.rmtree(folder, ignore_errors=True)
        elif state == "damaged" and (folder / "a").exists():
            (folder / generator.choice("ab")).write_text("damage")
        children = [ask() for _ in range(3)]
        killed = children[: generator.choice([1, 2])]
        for child in killed:
            time.sleep(generator.uniform(0, 0.02))
            os.kill(child, signal.SIGKILL)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert set(codes[: len(killed)]) <= {0, -signal.SIGKILL}
        assert set(codes[len(killed) :]) == {0}
    shutil.rmtree(folder)
    made_once(folder, make)  # cleans up after the last
    assert sorted(path.name for path in folder.parent.iterdir()) == ["name", "name.lock"]
    assert not list(tmp_path.glob(".*"))
