"""How long a run will take: a few of its real steps, timed with few blocks and extrapolated to the whole stack.

Blocks are alike, so the time of a step is affine in their number; so it is in the number of micro-batches. Loading
batches is left out: 0.5 us a token, 0.2 % of a mini model's step on one CPU thread; with an accelerator workers do it
meanwhile. So are start, checkpoints and MemoryMonitor's samples.
"""

from __future__ import annotations

import gc
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from leanbert.data.batches.batch import MLMBatch, PairBatch
from leanbert.errors import UserError
from leanbert.models.packed_inputs import PackedInputs
from leanbert.planning.dry_run import (
    begin,
    build,
    keep_no_outputs,
    keeps_outputs,
    run_teacher,
    set_up,
    stage,
    take_step,
)
from leanbert.planning.predict import rows_of_dry_run
from leanbert.planning.profile import Profile, bits
from leanbert.planning.run_settings import RunSettings
from leanbert.ranges import Range

SMALLEST_STACK = 2
"""Blocks of the smaller stack that is timed, at least; the larger one has as many more, or a whole period."""

LEAST_LAPS, MOST_LAPS, ENOUGH_SECONDS = 3, 20, 6.0
"""Something is timed until it has run so often and so long, and not oftener."""

PEAK_FLOPS: dict[str, dict[str, float]] = {
    "t4": {"16": 65e12, "32": 8.1e12},  # NVIDIA T4 datasheet (fp16: it has no bf16)
    "rtx3090": {"16": 71e12, "32": 35.6e12},  # NVIDIA Ampere GA102 whitepaper, accumulating in fp32
    "rtx4090": {"16": 165.2e12, "32": 82.6e12},  # NVIDIA Ada whitepaper, accumulating in fp32
    "l4": {"16": 121e12, "32": 30.3e12},  # NVIDIA L4 datasheet (242 with sparsity)
    "a100": {"16": 312e12, "32": 19.5e12},  # NVIDIA A100 datasheet
    "h100-sxm": {"16": 989e12, "32": 67e12},  # NVIDIA H100 datasheet (1,979 with sparsity)
    "h200-sxm": {"16": 989e12, "32": 67e12},  # NVIDIA H200 datasheet (1,979 with sparsity)
}
"""Dense peaks in FLOP/s, by device and bits of a number: 16 in tensor cores (bf16 or fp16), 32 outside them."""


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a training step and of a validation batch on one device, and of a row of a teacher that runs first."""

    step: float
    validation_batch: float
    teacher_row: float = 0.0


@dataclass(frozen=True)
class RunLength:
    """What a run does, besides starting and writing checkpoints."""

    steps: int
    validations: int
    batches_per_validation: int
    training_rows: int = 0

    def seconds(self, times: StepTimes) -> float:
        """Return the seconds from its teacher or first validation to its last, without start and checkpoints."""
        validation = self.validations * self.batches_per_validation * times.validation_batch
        return self.training_rows * times.teacher_row + self.steps * times.step + validation


def measure(settings: RunSettings, *, clock: Callable[[], float] = time.perf_counter) -> StepTimes:
    """Time real steps of the run, with random tokens, and validation batches on the device of the settings.

    Args:
        settings: The run; neither its task nor its data is touched.
        clock: Returns seconds.

    Raises:
        UserError: Techniques that cannot combine, or match nothing.

    """
    rows, layers = rows_of_dry_run(settings), settings.task.encoder_config.num_layers
    depths = _depths(settings)
    gc.collect()
    gc.freeze()  # a process that has planned holds many objects, which every collection would look through
    try:
        with tqdm(desc="Timing steps", unit="step", disable=None, leave=False) as bar:
            stacks = [_time_stack(settings, rows, depth, clock, bar.update) for depth in depths]
    finally:
        gc.unfreeze()
    times = (layers - depths[0]) / (depths[-1] - depths[0]) if len(depths) > 1 else 0.0
    passes, update, validation, teacher = (  # a block takes no negative time, however loud the noise
        one + times * max(0.0, other - one) for one, other in zip(stacks[0], stacks[-1], strict=True)
    )
    return StepTimes(passes * settings.rows_per_step / rows + update, validation, teacher)


def _depths(settings: RunSettings) -> list[int]:
    """Return the numbers of blocks to time: two small stacks, or the one of the settings."""
    layers, period = settings.task.encoder_config.num_layers, _period_of_blocks(settings)
    small = SMALLEST_STACK + (layers - SMALLEST_STACK) % period
    large = small + period * -(-SMALLEST_STACK // period)
    removed = settings.techniques.structured
    alike = settings.task.teacher_source is None and not (removed and removed[2])  # else depth is not one number
    return [small, large] if alike and large < layers else [layers]


def _period_of_blocks(settings: RunSettings) -> int:
    """Return after how many blocks the stack repeats itself."""
    config = settings.task.encoder_config.resolved()
    return math.lcm(settings.techniques.keep_every, config.global_every if config.local_window else 1)


def _time_stack(
    settings: RunSettings, rows: int, layers: int, clock: Callable[[], float], tick: Callable[[], object]
) -> tuple[float, float, float, float]:
    """Return the median seconds of the passes of a step, of its update, of a validation batch and a teacher's row."""
    gc.collect()  # the stack before: task and trainer hold each other
    task, data, trainer = stage(settings, rows, layers, real=True)
    device = trainer.strategy.root_device
    sizes = [tokenizer.vocab_size for tokenizer in data.tokenizers.values()]

    def filled(blank: Any) -> Any:
        batch = fill(blank, *sizes)
        return (batch.delimited() if device.type == "cuda" else batch).to(device)

    def now() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return clock()

    def step() -> tuple[float, float]:
        started, backward_ended = now(), [0.0]
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            callback.on_train_batch_start(trainer, task, batch, 0)
        take_step(task, trainer, batch, lambda: backward_ended.append(now()))
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            callback.on_train_batch_end(trainer, task, None, batch, 0)
        tick()
        return backward_ended[-1] - started, now() - backward_ended[-1]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        set_up(task, trainer)
        build(task, trainer, replace(settings, mesh=None))
        trainer.strategy.model_to_device()  # weights are there already, metrics are not
        batch = filled(data.blank_batch(rows))
        teacher = 0.0
        if keeps_outputs(task):
            part = batch.split(settings.micro_batch)[0]
            teacher = median(_repeat(_lap(lambda: run_teacher(task, trainer, part), now, tick), clock)) / len(part)
        keep_no_outputs(task, trainer, batch)
        begin(task, trainer, batch)
        passes, updates = zip(*_repeat(step, clock), strict=True)
        task.eval()
        held_out = filled(data.blank_batch(settings.validation_rows, validation=True))
        with torch.no_grad():
            lap = _lap(lambda: trainer.strategy.validation_step(held_out, 0), now, tick)
            return median(passes), median(updates), median(_repeat(lap, clock)), teacher


def _lap(work: Callable[[], object], now: Callable[[], float], tick: Callable[[], object]) -> Callable[[], float]:
    """Return what works and returns how long that took."""

    def lap() -> float:
        started = now()
        work()
        tick()
        return now() - started

    return lap


def _repeat(lap: Callable[[], Any], clock: Callable[[], float]) -> list[Any]:
    """Return what each lap returns, save the first, which makes state, compiles, and touches memory."""
    lap()
    laps: list[Any] = []
    started = clock()
    while len(laps) < LEAST_LAPS or (len(laps) < MOST_LAPS and clock() - started < ENOUGH_SECONDS):
        laps.append(lap())
    return laps


def fill(blank: Any, vocab_size: int, target_vocab_size: int | None = None) -> Any:
    """Return a batch of random tokens, one document a row, in the shape of a `blank` of any task; always the same."""
    generator = torch.Generator().manual_seed(0)

    def drawn(like: Tensor, size: int | None = None) -> Tensor:
        return torch.randint(size or vocab_size, like.shape, generator=generator)

    ids, targets = drawn(blank.inputs.input_ids), blank.targets
    inputs = PackedInputs.whole_rows(ids, blank.inputs.segment_ids)
    if isinstance(blank, PairBatch):
        decoder_inputs = PackedInputs.whole_rows(drawn(blank.decoder_inputs.input_ids, target_vocab_size))
        return PairBatch(inputs, decoder_inputs, drawn(targets, target_vocab_size))
    index = torch.rand(ids.shape, generator=generator).argsort(dim=1)[:, : targets.shape[1]].sort(dim=1).values
    truth = ids.gather(1, index) if isinstance(blank, MLMBatch) else torch.zeros_like(targets)
    return replace(blank, inputs=inputs, target_index=index, targets=truth)


def count_validations(
    steps: int, interval: int | float, *, every_n_epochs: int | None = None, batches_per_epoch: int = 1
) -> int:
    """Return how often `fit` validates: before step 1, periodically as Lightning does, and after the last step.

    Args:
        steps: Optimizer steps of the run.
        interval: `trainer.val_check_interval`: steps, or a fraction of an epoch.
        every_n_epochs: `trainer.check_val_every_n_epoch`; None: steps are counted through all epochs.
        batches_per_epoch: Steps of an epoch.

    """
    every = interval if isinstance(interval, int) else max(1, int(batches_per_epoch * interval))
    if every_n_epochs is None:
        every_n_epochs, batches_per_epoch = 1, steps + 1  # one epoch that does not end
    epochs, rest = divmod(steps, batches_per_epoch)
    periodic = epochs // every_n_epochs * (batches_per_epoch // every)
    if (epochs + 1) % every_n_epochs == 0:
        periodic += rest // every
    last_epoch, last = (epochs + 1, rest) if rest else (epochs, batches_per_epoch)
    ends_with_one = last_epoch % every_n_epochs == 0 and last % every == 0
    return 1 + periodic + (not ends_with_one)


def limited(batches: int, limit: int | float | None) -> int:
    """Return the batches of a validation under `trainer.limit_val_batches`: a number, a fraction, or None: all."""
    if limit is None:
        return batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def peak_flops(device: str, precision: str) -> float:
    """Return the peak of a device of `PEAK_FLOPS` in FLOP/s at a precision of Lightning's, such as bf16-mixed.

    Raises:
        UserError: The device is not in the table.

    """
    if device not in PEAK_FLOPS:
        raise UserError(f"device: {device} is unknown. Choose one of {', '.join(PEAK_FLOPS)}, or give its peak FLOP/s.")
    return PEAK_FLOPS[device][bits(precision)]


def estimator(device: str, share: float, profile: Profile | None, precision: str) -> Callable[[int], float]:
    """Return what gives the seconds of a step for its operations: by a profile, or at a share of the device's peak.

    Raises:
        UserError: The device is not in the table, or was not measured at that precision; the share is none.

    """
    Range(above=0, most=1).check("share", share)
    if profile is None:
        reached = share * peak_flops(device, precision)
        return lambda flops: flops / reached
    profile.check(precision)
    return lambda flops: profile.step_seconds(flops, precision)
