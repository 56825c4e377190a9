"""Ranks as Lightning, torchrun and srun start them: how many there are, the same losses, and how they end together."""

from __future__ import annotations

import json
import re
import time

import pytest

from leanbert import checkpoints
from tests.corpus import write_corpus
from tests.distributed.faults import digests
from tests.distributed.launching import errors, lightning, lives, machines_that_may_go, started, torchrun, two_machines
from tests.training import read_scalars

pytestmark = pytest.mark.slow

STEPS = 20
ALIKE = 1e-5
IN_SHARDS = {"sharded": (1, None), "groups": (2, None), "background": (1, 0.0), "slow": (1, 0.2)}
"""Strategies that write checkpoints in shards: groups, and after how many seconds in the background, if there."""
GO_ON = "A training goes on with --ckpt_path last."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    write_corpus(folder / "train.txt", documents=60)
    accumulation = "{class_path: GradientAccumulation, init_args: {micro_batch: 1}}"
    (folder / "micro.yaml").write_text(f"trainer:\n  callbacks+: [{accumulation}]\n")
    for name, (replicas, seconds) in IN_SHARDS.items():
        settings = {"class_path": "FullySharded", "init_args": {"checkpoints": "sharded", "replicas": replicas}}
        late = {"class_path": "tests.distributed.faults.InBackground", "init_args": {"seconds": seconds}}
        given = {"strategy": settings, "callbacks+": [] if seconds is None else [late]}
        (folder / f"{name}.yaml").write_text(json.dumps({"trainer": given}))
    return folder


def to(root, *more, steps=STEPS):
    return (
        "--config=micro.yaml", f"--trainer.default_root_dir={root}", f"--trainer.max_steps={steps}",
        "--checkpoint.every_n_steps=5", "--checkpoint.keep=9", *more,
    )  # fmt: skip


def strategy(name):
    return f"--config={name}.yaml" if name in IN_SHARDS else f"--config=configs/strategy/{name}.yaml"


def callback(folder, name, made, /, **settings):
    """Write an overlay with a callback of `faults.py`; return the option that names it."""
    arguments = ", ".join(f"{key}: {value}" for key, value in settings.items())
    entry = f"{{class_path: tests.distributed.faults.{made}, init_args: {{{arguments}}}}}"
    (folder / f"{name}.yaml").write_text(f"trainer:\n  callbacks+: [{entry}]\n")
    return f"--config={name}.yaml"


def alike(folder, root, expected):
    found = read_scalars(folder / root / "mlm" / "version_0")
    for tag in ("train/loss", "val/loss"):
        assert found[tag] == pytest.approx(expected[tag], rel=ALIKE), tag


@pytest.fixture(scope="module")
def alone(folder):
    """One process: its losses, and the rows of each step."""
    digest = callback(folder, "digests-alone", "BatchDigests", to="rows-alone")
    [(code, words)] = started(folder, lightning(*to("alone", digest), ranks=1))
    assert code == 0, words
    rows = digests(folder / "rows-alone")
    assert rows.keys() == {*range(STEPS)}
    assert len({row for step in rows.values() for row in step}) == 8 * STEPS  # masks are new in each epoch
    return read_scalars(folder / "alone" / "mlm" / "version_0"), rows


def test_torchrun_decides_how_many_devices_there_are(folder, alone):
    [(code, words)] = started(folder, torchrun(*to("torchrun"), strategy("fsdp"), ranks=2))
    assert code == 0, words
    assert "device      cpu x 2," in words
    alike(folder, "torchrun", alone[0])


def test_two_machines(folder, alone):
    given = (*to("machines"), strategy("hsdp"))
    ended = started(folder, *(torchrun(*given, ranks=2, options=options) for options in two_machines()))
    assert [code for code, _ in ended] == [0, 0], ended
    assert "device      cpu x 4," in ended[0][1]
    assert "device" not in ended[1][1]
    alike(folder, "machines", alone[0])


CHAINS = {
    "2-1-4": (("ddp", 2), (None, 1), ("fsdp", 4)),
    "ddp-fsdp-one": (("ddp", 2), ("fsdp", 2), (None, 1)),
    "shards-2-1-4": (("slow", 2), (None, 1), ("groups", 4)),
    "shards-4-2-ddp": (("groups", 4), ("sharded", 2), ("ddp", 2)),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_a_run_goes_on_with_other_devices_and_the_same_rows_masks_and_losses(folder, alone, chain):
    """Each part starts from a checkpoint in the middle of an epoch, which the part before has written."""
    for part, (name, ranks) in enumerate(CHAINS[chain]):
        rows = f"rows-{chain}-{part}"
        given = [*to(chain), callback(folder, rows, "BatchDigests", to=rows)]
        given += [strategy(name)] if name else []
        if part:
            given.append(f"--ckpt_path={chain}/mlm/version_0/checkpoints/step-{5 * part:08d}.ckpt")
        [(code, words)] = started(folder, lightning(*given, ranks=ranks))
        assert code == 0, words
        assert digests(folder / rows) == {step: alone[1][step] for step in range(5 * part, STEPS)}
        for path in (folder / chain / "mlm" / "version_0" / "checkpoints").glob("step-*.ckpt"):
            if int(path.stem.removeprefix("step-")) > 5 * part:
                assert path.is_dir() == (name in IN_SHARDS), path
    alike(folder, chain, alone[0])


# ---- ranks that end before their time


def ended_by_fault(folder, tmp_path, start, ranks, *faults, overlay=None):
    """Train in `tmp_path` until a fault; return exit code, errors, all words, and seconds until all had ended."""
    (tmp_path / "train.txt").symlink_to(folder / "train.txt")
    (tmp_path / "micro.yaml").symlink_to(folder / "micro.yaml")
    overlays = [
        callback(tmp_path, name, name, kind=kind, rank=rank)
        for name, (kind, rank) in zip(("Fault", "AnotherFault"), faults, strict=False)
    ]
    [(code, words)] = started(tmp_path, start(*to("runs", *overlays, overlay or strategy("ddp")), ranks=ranks))
    assert (tmp_path / "fault").exists(), words
    pids = [int((tmp_path / f"pid-{rank}").read_text()) for rank in range(ranks)]
    deadline = time.time() + 60
    while any(map(lives, pids)) and time.time() < deadline:
        time.sleep(0.2)
    return code, errors(words), words, time.time() - float((tmp_path / "fault").read_text())


def test_a_rank_that_is_killed_ends_all_with_its_number(folder, tmp_path):
    """Another one hangs, as those do that wait for the dead one on a GPU."""
    code, found, words, seconds = ended_by_fault(folder, tmp_path, lightning, 4, ("kill", 2), ("hang", 1))
    assert code == 1
    assert found == [f"error: rank 2 was ended by SIGKILL (the system does so when its memory is full). {GO_ON}"]
    assert "Traceback" not in words
    assert seconds < 60


def test_a_rank_that_hangs_ends_with_those_that_have_waited_for_it(folder, tmp_path):
    settings = {"class_path": "FullySharded", "init_args": {"replicas": 2, "timeout": "0:00:05"}}
    waits = f"--trainer.strategy={json.dumps(settings)}"
    code, found, words, seconds = ended_by_fault(folder, tmp_path, lightning, 2, ("freeze", 1), overlay=waits)
    assert code == 1
    assert found == [f"error: another rank has not answered in time: it hangs, or cannot be reached. {GO_ON}"]
    assert "Traceback" not in words
    assert seconds < 60


def test_the_death_of_the_first_rank_ends_the_others(folder, tmp_path):
    code, found, words, seconds = ended_by_fault(folder, tmp_path, lightning, 4, ("kill", 0), ("hang", 1))
    assert code == -9
    assert sorted(found) == [f"error: rank {rank}: rank 0 has ended. {GO_ON}" for rank in (1, 2, 3)]
    assert "Traceback" not in words
    assert seconds < 60


def test_torchrun_says_which_rank_was_killed(folder, tmp_path):
    code, found, words, seconds = ended_by_fault(folder, tmp_path, torchrun, 2, ("kill", 1))
    assert (code, found) == (1, [])
    assert "rank      : 1 (local_rank: 1)\n  exitcode  : -9" in words.partition("Root Cause")[2]
    assert seconds < 60


@pytest.mark.parametrize(("start", "code"), [(lightning, 2), (torchrun, 1)])
def test_bad_input_on_one_rank_is_one_line(folder, tmp_path, start, code):
    found = ended_by_fault(folder, tmp_path, start, 2, ("error", 1))
    assert found[:2] == (code, ["error: rank 1: data.train_files: cannot be read here. Mend it."])
    assert found[3] < 60


def test_an_error_of_the_program_on_one_rank_is_named(folder, tmp_path):
    code, found, words, seconds = ended_by_fault(folder, tmp_path, lightning, 2, ("bug", 1))
    assert (code, found) == (1, ["error: rank 1 has failed with exit code 1, see above."])
    assert "ValueError: no such thing" in words
    assert seconds < 60


KILLED = [("ddp", "kill", 1), ("fsdp", "torn", 0), ("sharded", "torn", 0), ("background", "cut", 1)]


@pytest.mark.parametrize(("name", "kind", "rank"), KILLED)
def test_torchrun_starts_a_killed_run_again(folder, alone, name, kind, rank):
    """Killed between two checkpoints, as the second one gets its name, and while it is written by two ranks."""
    root = f"again-{name}"
    fault = callback(folder, root, "Fault", kind=kind, rank=rank, step=14)
    given = torchrun(
        *to(root, "--ckpt_path=auto"), strategy(name), fault, ranks=2, options=("--standalone", "--max-restarts=2")
    )
    [(code, words)] = started(folder, given)
    assert code == 0, words
    assert "last: again" in words
    assert "step-00000010.ckpt, step 10" in words
    assert [path.name for path in (folder / root / "mlm").iterdir()] == ["version_0"]
    alike(folder, root, alone[0])
    left = sorted(path.name for path in (folder / root / "mlm" / "version_0" / "checkpoints").iterdir())
    assert left == ["best.ckpt", *(f"step-{step:08d}.ckpt" for step in (5, 10, 15, 20))]


def test_a_full_disk_of_one_rank_ends_all_with_one_line(folder):
    """Found out in the background, it ends the run at the next step whose number ranks agree on."""
    fault = callback(folder, "full", "Fault", kind="full", rank=1, step=4)
    [(code, words)] = started(folder, lightning(*to("full", fault), strategy("background"), ranks=2))
    assert code == 2, words
    [line] = errors(words)
    assert "the disk is full" in line
    assert line.endswith("choose another disk with --trainer.default_root_dir")
    assert not list((folder / "full" / "mlm" / "version_0" / "checkpoints").glob("*step*"))


def test_a_run_that_is_stopped_waits_for_its_shards(folder):
    stop = callback(folder, "stop", "Fault", kind="stop", rank=0, step=7)
    [(code, words)] = started(folder, lightning(*to("stop", stop), strategy("slow"), ranks=2))
    assert code == 143, words
    assert errors(words) == []
    summary = json.loads((folder / "stop" / "mlm" / "version_0" / "summary.json").read_text())
    assert summary["checkpoint"] == "stop/mlm/version_0/checkpoints/step-00000010.ckpt"
    assert checkpoints.is_whole(folder / summary["checkpoint"])


def test_a_run_goes_on_without_a_machine_that_dies(folder, alone):
    """Two machines, then one, with a checkpoint of both; both see one folder."""
    fault = callback(folder, "machine", "Fault", kind="machine", rank=-1, step=7)
    given = (*to("without", "--ckpt_path=auto"), strategy("fsdp"), fault)
    first, doomed = (torchrun(*given, ranks=1, options=options) for options in machines_that_may_go())
    ended = started(folder, first, ["env", "DOOMED=1", *doomed], TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    words = "".join(said for _, said in ended)
    assert [code for code, _ in ended] == [0, -9], words
    assert "device      cpu x 2," in words
    assert "device      cpu x 1," in ended[0][1]
    assert "step-00000005.ckpt, step 5" in ended[0][1]
    alike(folder, "without", alone[0])


# ---- bad input


@pytest.mark.parametrize("start", [lightning, torchrun])
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--data.batch_size=7"], "data.batch_size: 7 is the batch of all devices together and not divisible"),
        (["--data.train_files=one.txt", "--data.val_files=train.txt"], "data.train_files: has 1 rows, which 2 devices"),
    ],
)
def test_a_batch_or_text_that_ranks_cannot_share(folder, start, arguments, says):
    (folder / "one.txt").write_text("The cat sat.\n")
    [(code, words)] = started(folder, start(*to("unshared"), *arguments, strategy("ddp"), ranks=2))
    assert [line.startswith(f"error: {says}") for line in errors(words)] == [True], words
    if start is lightning:
        assert code == 2
    else:
        assert words.count("exitcode  : 2 ") == 2
    assert not (folder / "unshared" / "mlm" / "version_0").exists()


def test_a_strategy_that_does_not_exist(folder):
    [(_, words)] = started(folder, torchrun(*to("none"), "--trainer.strategy=magic", ranks=2))
    assert [line.startswith("error: trainer.strategy: magic is not known") for line in errors(words)] == [True]
    codes = re.findall(r"exitcode  : (-?\d+)", words)
    assert "2" in codes
    assert {*codes} <= {"2", "-15", "143"}  # torchrun ends a rank that has not ended yet


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ([], "data.train_files: is 58 examples, "),  # of the same name
        (["--model.optimizer.lr=1e-2"], "model.optimizer.lr: is 0.001 on rank 0 and 0.01 on rank 1."),
        (["--trainer.strategy=ddp"], "trainer.strategy: is fsdp on rank 0 and ddp on rank 1."),
    ],
)
def test_ranks_with_other_settings_or_data_are_found(folder, tmp_path, other, says):
    write_corpus(tmp_path / "train.txt", documents=50)
    (tmp_path / "micro.yaml").symlink_to(folder / "micro.yaml")
    given = [*to("unlike"), "--trainer.strategy=fsdp"]
    first, second = two_machines()
    there = ["env", "-C", str(folder if other else tmp_path), *torchrun(*given, *other, ranks=1, options=second)]
    ended = started(folder, torchrun(*given, ranks=1, options=first), there)
    for rank, (_, words) in enumerate(ended):
        before = "error: " if rank == 0 else "error: rank 1: "
        assert [line.startswith(before + says) for line in errors(words)] == [True], words
        assert words.count("exitcode  : 2 ") == 1
    assert not (folder / "unlike" / "mlm" / "version_0").exists()
