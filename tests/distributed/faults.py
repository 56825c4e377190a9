"""Callbacks for ranks in processes of their own: one that fails on purpose, one that records what each step sees."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import time
from pathlib import Path

from lightning.pytorch.callbacks import Callback

from leanbert import checkpoints
from leanbert.distributed import shard_writing
from leanbert.errors import UserError


class Fault(Callback):
    """At a step one rank is killed, hangs outside of any exchange, or fails; and each leaves its process's number.

    `kind` is kill, stop (by SIGTERM), hang, freeze (answers SIGKILL only), error, bug, torn (killed as it renames the
    next checkpoint), cut (killed as it has written its shard of the next one), full (its disk is, from the next shard
    on), or machine: the rank on the one that is `DOOMED` is killed with the process that started it. A rank that was
    started again has no fault.
    """

    def __init__(self, kind: str, rank: int, step: int = 3) -> None:
        self.kind, self.rank, self.step = kind, rank, step

    @property
    def state_key(self) -> str:
        return f"Fault{self.kind}{self.rank}"

    def on_train_batch_end(self, trainer, pl_module, *_):
        Path(f"pid-{trainer.global_rank}").write_text(str(os.getpid()))
        again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        met = "DOOMED" in os.environ if self.kind == "machine" else trainer.global_rank == self.rank
        if not met or again or trainer.global_step != self.step:
            return
        Path("fault").write_text(str(time.time()))
        if self.kind == "machine":
            os.kill(os.getppid(), signal.SIGKILL)
        if self.kind in ("kill", "machine"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
        if self.kind == "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.kind == "torn":
            checkpoints.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "cut":
            shard_writing.os.fsync = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "full":
            shard_writing.os.fsync = full
        if self.kind == "error":
            raise UserError("data.train_files: cannot be read here. Mend it.")
        if self.kind == "bug":
            raise ValueError("no such thing")
        while self.kind == "hang":
            time.sleep(1)


def full(_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class InBackground(Callback):
    """Has shards written in the background, as on a GPU, after some seconds."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def on_fit_start(self, trainer, pl_module):
        strategy = trainer.strategy
        write = strategy.writing._write
        strategy._may_copy = lambda size: True
        strategy.writing._write = lambda *given: (time.sleep(self.seconds), write(*given))


class AnotherFault(Fault):
    """The same, of another rank."""


class BatchDigests(Callback):
    """Write, of each step and rank, the digests of its rows: tokens, places, documents, masks and targets."""

    def __init__(self, to: str) -> None:
        self.folder = Path(to)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        inputs = batch.inputs
        tensors = (inputs.input_ids, inputs.position_ids, inputs.document_ids, batch.target_index, batch.targets)
        rows = [
            hashlib.sha256(b"".join(tensor[row].numpy().tobytes() for tensor in tensors)).hexdigest()[:16]
            for row in range(len(batch))
        ]
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"{trainer.global_step}-{trainer.global_rank}"
        path.write_text(" ".join(rows))


def digests(folder: Path) -> dict[int, list[str]]:
    """Return the rows of each step, in the order of the stream: rank r of N has every N-th, from r on."""
    ranks: dict[int, dict[int, list[str]]] = {}
    for path in folder.iterdir():
        step, rank = map(int, path.name.split("-"))
        ranks.setdefault(step, {})[rank] = path.read_text().split()
    return {
        step: [row for together in zip(*(found[rank] for rank in sorted(found)), strict=True) for row in together]
        for step, found in ranks.items()
    }
