import json
import multiprocessing
import os
import signal
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from leanbert import checkpoints
from leanbert.errors import UserError
from leanbert.files import REST
from leanbert.runs import TaskRuns

STATE = {"callbacks": {}, "optimizer_states": [], "lr_schedulers": []}


def checkpoint(step, **changes):
    return {"leanbert": {"task": "mlm"}, "state_dict": {"w": torch.arange(5)}, "global_step": step, **STATE, **changes}


def make_run(root, version, steps, best=None):
    folder = root / "mlm" / f"version_{version}" / "checkpoints"
    folder.mkdir(parents=True)
    for step in steps:
        checkpoints.save(checkpoint(step), folder / checkpoints.step_name(step))
    if best is not None:
        checkpoints.save(checkpoint(best), folder / checkpoints.BEST)
    return folder


def runs(root):
    return TaskRuns(str(root), "mlm")


def find(root, which="last"):
    return runs(root).find(which).path


# ---- which checkpoint a name means


def test_last_is_the_newest_of_the_newest_run(tmp_path, capsys):
    make_run(tmp_path, 2, [900])
    folder = make_run(tmp_path, 10, [100, 200])
    assert find(tmp_path) == folder / "step-00000200.ckpt"
    assert capsys.readouterr().err == f"last: {folder / 'step-00000200.ckpt'}, step 200\n"


@pytest.mark.parametrize(
    ("steps", "best", "expected"),
    [
        ([100, 200], 150, "step-00000200.ckpt"),
        ([100, 200], 250, "best.ckpt"),
        ([100, 200], 200, "step-00000200.ckpt"),
        ([], 50, "best.ckpt"),
    ],
)
def test_the_best_is_a_checkpoint_too(tmp_path, steps, best, expected):
    folder = make_run(tmp_path, 0, steps, best)
    assert find(tmp_path) == folder / expected


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 0x7F
    path.write_bytes(content)


def into_folder(path):
    path.unlink()
    path.mkdir()


DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:700]),
    "empty": lambda path: path.write_bytes(b""),
    "weights": lambda path: flip(path, path.read_bytes().index(torch.arange(5).numpy().tobytes())),
    "directory": lambda path: flip(path, path.read_bytes().index(b"PK\1\2") + 10),  # the kind of compression
    "name": lambda path: flip(path, path.read_bytes().rindex(b"PK\1\2") + 46),
    "end": lambda path: flip(path, -22),
    "folder": into_folder,
    "parts": lambda path: torch.save({"leanbert": {}}, path),
    "weights only": lambda path: checkpoints.save({"leanbert": {}, "state_dict": {}, "global_step": 200}, path),
    "text": lambda path: path.write_text("x" * 4000),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_last_falls_back_from_a_damaged_file_and_says_so(tmp_path, capsys, damage):
    folder = make_run(tmp_path, 0, [100, 200])
    DAMAGE[damage](folder / "step-00000200.ckpt")
    assert find(tmp_path) == folder / "step-00000100.ckpt"
    assert capsys.readouterr().err.endswith("step 100; passed over, damaged: step-00000200.ckpt\n")


def in_shards(folder, step):
    """A checkpoint in shards, none of whose tensors is in them."""
    path = folder / checkpoints.step_name(step)
    path.mkdir()
    (path / "00000.safetensors").write_bytes(b"shard")
    checkpoints.save(checkpoint(step, shards={"00000.safetensors": [5, zlib.crc32(b"shard")]}), path / REST)
    return path


@pytest.mark.parametrize("content", [None, b"shar", b"Shard"])
def test_last_falls_back_from_a_damaged_shard(tmp_path, capsys, content):
    """Of the ranks that train the first alone looks for changed bytes: it puts such a folder where none looks."""
    folder = make_run(tmp_path, 0, [100])
    good, bad = in_shards(folder, 200), in_shards(folder, 300)
    assert find(tmp_path) == bad
    (bad / "00000.safetensors").unlink()
    if content is not None:
        (bad / "00000.safetensors").write_bytes(content)
    assert find(tmp_path) == good
    changed = content == b"Shard"
    _, found = runs(tmp_path).find_to_train("last", lock=False)
    assert found.path == (bad if changed else good)
    run, found = runs(tmp_path).find_to_train("last", lock=True)
    assert found.path == good
    assert capsys.readouterr().err.endswith("step 200; passed over, damaged: step-00000300.ckpt\n")
    run.release()
    assert not bad.exists()
    assert (folder / "abandoned-step-00000300.ckpt").is_dir()
    _, found = runs(tmp_path).find_to_train("last", lock=False)
    assert found.path == good


def test_an_older_run_never_stands_in_for_a_newer_one(tmp_path):
    older = make_run(tmp_path, 0, [100], best=50)
    newer = make_run(tmp_path, 1, [])
    for which in ("last", "best", "average"):
        with pytest.raises(UserError, match=rf"{which}: .*version_1.*such as .*step-00000100\.ckpt of an older run"):
            find(tmp_path, which)
    run, found = runs(tmp_path).find_to_train("last", lock=True)
    assert (run.folder, found) == (newer.parent, None)
    run.release()
    run, found = runs(tmp_path).find_to_train("auto", lock=True)
    assert (run.folder, found) == (newer.parent, None)
    run.release()
    older.parent.rename(tmp_path / "mlm" / "version_2")
    assert find(tmp_path) == tmp_path / "mlm" / "version_2" / "checkpoints" / "step-00000100.ckpt"


def test_nothing_to_go_on_from(tmp_path):
    with pytest.raises(UserError, match=r"no run below .*\. Train one with fit, or name a file\.$"):
        find(tmp_path)
    with pytest.raises(UserError, match=r"no run below .*\. Leave --ckpt_path out to start one\.$"):
        runs(tmp_path).find_to_train("last", lock=True)
    assert runs(tmp_path).find_to_train("auto", lock=True) == (None, None)
    folder = make_run(tmp_path, 0, [5])
    with pytest.raises(UserError, match="has not validated yet"):
        find(tmp_path, "best")
    (folder / checkpoints.step_name(5)).write_bytes(b"cut")
    for which in ("last", "auto"):  # what is damaged is not started again over it
        with pytest.raises(UserError, match="no usable checkpoint"):
            runs(tmp_path).find_to_train(which, lock=True)
    runs(tmp_path).all()[0].lock()  # it was given back


def test_a_run_is_known_by_its_place(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "root", 3, [7])
    (tmp_path / "link").symlink_to(tmp_path / "root")
    monkeypatch.chdir(tmp_path)
    for root in ("root", "link", str(tmp_path / "root"), "./root/../root"):
        assert runs(root).owner(folder / "step-00000007.ckpt").folder.samefile(folder.parent), root
    assert runs("root").owner(tmp_path / "step-00000007.ckpt") is None
    (tmp_path / "other").mkdir()
    assert runs("other").owner(folder / "step-00000007.ckpt") is None


def test_finished_is_what_the_summary_says(tmp_path):
    make_run(tmp_path, 0, [5])
    run = runs(tmp_path).all()[0]
    assert not run.finished_at(5)
    for text, expected in [
        (json.dumps({"status": "finished", "steps": 5}), True),
        (json.dumps({"status": "finished", "steps": 4}), False),
        (json.dumps({"status": "interrupted", "steps": 5}), False),
        ("{", False),
        ("[]", False),
    ]:
        (run.folder / "summary.json").write_text(text)
        assert run.finished_at(5) is expected, text


# ---- several processes


def create(root, count):
    return [TaskRuns(root, "mlm").create().folder.name for _ in range(count)]


def test_each_process_has_a_folder_of_its_own(tmp_path):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        names = [name for some in pool.starmap(create, [(str(tmp_path), 10)] * 4, chunksize=1) for name in some]
    assert sorted(names) == sorted(f"version_{number}" for number in range(40))


def test_each_thread_has_a_folder_of_its_own(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        names = [name for some in pool.map(lambda _: create(str(tmp_path), 10), range(8)) for name in some]
    assert sorted(names) == sorted(f"version_{number}" for number in range(80))


HOLD = """
import sys, time
from leanbert.runs import TaskRuns
run = TaskRuns(sys.argv[1], 'mlm').create()
print('held', flush=True)
time.sleep(60)
"""


def test_a_run_is_trained_once_and_a_killed_process_lets_go(tmp_path):
    """What the killed one has left half-written is removed; so it is not while it lives."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    folder = tmp_path / "mlm" / "version_0"
    (folder / "checkpoints").mkdir()
    leftovers = [folder / ".summary.json.tmp-0123abcd", folder / "checkpoints" / ".best.ckpt.tmp-0123abcd"]
    for path in leftovers:
        path.touch()
    for which in ("last", "auto"):
        with pytest.raises(UserError, match="version_0: another process is training this run"):
            runs(tmp_path).find_to_train(which, lock=True)
    assert all(path.exists() for path in leftovers)
    assert runs(tmp_path).find_to_train("last", lock=False)[0].folder == folder  # another rank of the same run
    assert runs(tmp_path).create().folder.name == "version_1"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    runs(tmp_path).all()[0].lock()
    assert not any(path.exists() for path in leftovers)


def test_a_worker_that_outlives_its_run_does_not_hold_it(tmp_path):
    run = runs(tmp_path).create()
    read, write = os.pipe()
    if (worker := os.fork()) == 0:
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    run.release()
    assert runs(tmp_path).all()[0].try_lock()
    os.close(write)
    os.waitpid(worker, 0)


# ---- roots that are none


def test_a_root_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for root, why in [
        (str(tmp_path / "file"), "file"), ("", "empty"), ("~nosuchuser/runs", "no such user"), ("/proc", "/proc"),
        ("x" * 300, "too long"), (str(tmp_path / "file" / "deeper"), "Not a directory"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=rf"^trainer\.default_root_dir: .*{why}.*[Gg]ive"):
            runs(root).create()
