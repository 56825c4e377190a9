"""The memory techniques of LeanBERT, in the order in which they are applied and documented.

The plan's order of costs: what is free, micro-batches, 16-bit products, selective then full checkpointing, the
optimizer in the backward pass, low-bit optimizer state, 16-bit weights, offload, and last what changes the model. On a
CPU without 16-bit matrix products (a CPU target is this machine) 16 bits come last: they take longer than the disk.
"""

from __future__ import annotations

from collections.abc import Callable

from leanbert.compression.structured import prune_structured, remove_blocks, sizes_kept
from leanbert.errors import under
from leanbert.memory.allocator import can_be_asked
from leanbert.memory.checkpointing import set_checkpointing
from leanbert.memory.offload import DiskStorage, to_host
from leanbert.memory.precision import has_16_bit_products
from leanbert.models.base import EncoderModel
from leanbert.tasks.techniques import conflicts
from leanbert.tasks.techniques.contract import Surroundings, Technique, Techniques

STATEFUL = ("adam", "adamw", "muon")
"""Optimizers whose state low-bit AdamW can take the place of."""


def _at(
    number: int, suits: Callable[[Surroundings], bool] = lambda around: True
) -> Callable[[Surroundings], int | None]:
    return lambda around: number if suits(around) else None


def _has_products(around: Surroundings) -> bool:
    return around.device_type != "cpu" or has_16_bit_products("cpu")


def _bf16_true_rung(around: Surroundings) -> int | None:
    if "true" in around.precision and around.precision != "32-true":
        return None
    return 10 if _has_products(around) else 12


def _chunk_head(model: EncoderModel, t: Techniques) -> None:
    model.head_chunk = t.head_chunk


def _checkpoint(model: EncoderModel, t: Techniques) -> None:
    if t.keep != "all":
        set_checkpointing(model.blocks, t.keep, t.keep_every)


def _slice(model: EncoderModel, t: Techniques) -> None:
    for block in model.blocks:
        block.slice_rows = t.slice_rows


def _offload(model: EncoderModel, t: Techniques) -> None:
    if t.storage != "device":
        storage = to_host if t.storage == "host" else DiskStorage(t.storage)
        for stack in model.stacks:
            stack.storage = storage


def _prune(model: EncoderModel, t: Techniques) -> None:
    if t.structured is not None:
        heads, neurons, blocks = t.structured
        if blocks:
            with under("StructuredPruning.blocks"):
                remove_blocks(model, blocks)
        if heads or neurons:
            with under("StructuredPruning.heads"):
                sizes = sizes_kept(model.config, heads, neurons)
            prune_structured(model, *sizes)


TECHNIQUES = (
    Technique(
        "return_pages", exact=True, lowers="resident memory on CPU, to live tensors",
        costs="page faults: a step takes 1.1 to 1.6 times as long, by machine",
        rung=_at(2, lambda around: around.device_type == "cpu" and can_be_asked()),
    ),
    Technique(
        "accumulation", exact=True, lowers="activations, to those of a micro-batch",
        costs="small products use the device less well", conflicts=conflicts.accumulation, eases="activations",
        rung=_at(3), replaced_by=("layer_major",),
    ),
    Technique(
        "oom_recovery", exact=True,
        lowers="nothing by itself: when memory runs out, the step is replayed with half the micro-batch",
        costs="a replayed step", conflicts=conflicts.recovery,
    ),
    Technique(
        "chunked_head", exact=True, lowers="logits, to those of 256 targets", costs="nothing", apply=_chunk_head,
        rung=_at(1), replaced_by=("accumulation",),
    ),
    Technique(
        "selective_checkpointing", exact=True, lowers="activations, to the outputs of matrix products",
        costs="a few percent of compute", conflicts=conflicts.selective,
        rung=_at(5), replaced_by=("checkpointing", "layer_major"),
    ),
    Technique(
        "checkpointing", exact=True, lowers="activations, to the input of each block",
        costs="one more forward pass of the blocks", apply=_checkpoint, eases="activations",
        rung=_at(6), replaced_by=("layer_major",),
    ),
    Technique(
        "layer_major", exact=True,
        lowers="the same, block by block over slices of the batch, so that gradients can go block by block",
        costs="one more forward pass of the blocks", conflicts=conflicts.layer_major, apply=_slice, rung=_at(7),
    ),
    Technique(
        "optimizer_in_backward", exact=True, lowers="gradients, to one parameter's",
        costs="no clipping of gradients, no ddp", conflicts=conflicts.in_backward, eases="gradients", rung=_at(7),
    ),
    Technique(
        "bf16_mixed", exact=False, lowers="activations, by about half", costs="16-bit rounding of products",
        rung=_at(4, lambda around: _has_products(around) and around.precision in ("32-true", "32")),
        replaced_by=("bf16_true",),
    ),
    Technique(
        "fp16_mixed", exact=False, lowers="activations, by about half", costs="16-bit rounding of products",
        conflicts=conflicts.loss_scaling,
    ),
    Technique(
        "adamw_8bit", exact=False, lowers="optimizer state, to a quarter", costs="8-bit moments, a slower update",
        eases="optimizer",
        rung=_at(8, lambda around: around.optimizer in STATEFUL), replaced_by=("adamw_4bit",),
    ),
    Technique(
        "adamw_4bit", exact=False, lowers="optimizer state, to an eighth", costs="4-bit moments, a slower update",
        rung=_at(9, lambda around: around.optimizer in STATEFUL),
    ),
    Technique(
        "adafactor", exact=False, lowers="optimizer state, to nearly nothing",
        costs="another optimizer: needs its own rate",
    ),
    Technique(
        "adama", exact=False, lowers="gradients, with micro-batches", costs="second moment of micro-batches",
        conflicts=conflicts.adama,
    ),
    Technique(
        "bf16_true", exact=False, lowers="parameters and gradients, by half",
        costs="weights in bfloat16, rounded at random", eases="parameters",
        rung=_bf16_true_rung,
    ),
    Technique(
        "offload", exact=True, lowers="activations, to disk", costs="the disk's speed", apply=_offload,
        rung=_at(11, lambda around: around.device_type == "cpu"),
    ),
    Technique(
        "offload_host", exact=True, lowers="activations, to an accelerator's host", costs="the bus to the host",
        conflicts=conflicts.host, rung=_at(11, lambda around: around.device_type != "cpu"),
    ),
    Technique(
        "pruning", exact=False, lowers="weights that count, not bytes while training", costs="accuracy",
        conflicts=conflicts.pruning,
    ),
    Technique(
        "pruning_2_4", exact=False, lowers="weights that count, not bytes while training", costs="accuracy",
        conflicts=conflicts.pruning,
    ),
    Technique(
        "movement_pruning", exact=False, lowers="weights that count, not bytes while training",
        costs="accuracy, and 5 bytes a weight while training", conflicts=conflicts.pruning,
    ),
    Technique(
        "quantization_aware", exact=False, lowers="what int8 or int4 costs in accuracy, not bytes while training",
        costs="a rounded copy of each weight until its backward pass", conflicts=conflicts.rounding,
    ),
    Technique(
        "structured_pruning", exact=False, lowers="everything: heads and neurons are removed",
        costs="accuracy: half of the heads and neurons leave the model", conflicts=conflicts.structured, apply=_prune,
        rung=_at(13),
    ),
    Technique("lean", exact=False, lowers="all of it", costs="compute, precision"),
)  # fmt: skip
