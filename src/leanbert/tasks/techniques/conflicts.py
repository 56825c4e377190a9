"""Why a technique cannot run with others, or in some surroundings: each reason with the fix."""

from __future__ import annotations

from collections.abc import Iterator

from leanbert.tasks.techniques.contract import Surroundings, Techniques


def accumulation(t: Techniques, around: Surroundings) -> Iterator[str]:
    """Each micro-batch has a backward pass, and so an update inside it."""
    if t.in_backward == "update" and t.micro_batch is not None:
        yield (
            "OptimizerInBackward: with gradient accumulation a parameter would be updated after each micro-batch. Use "
            "LayerMajor instead of GradientAccumulation (exact), or OptimizerInBackward.accumulate=true (AdamA)."
        )


def adama(t: Techniques, around: Surroundings) -> Iterator[str]:
    """AdamA folds several micro-batches into Adam's moments."""
    if t.in_backward == "accumulate" and t.micro_batch is None:
        yield "OptimizerInBackward.accumulate: has no effect without GradientAccumulation. Leave it out."
    if t.in_backward == "accumulate" and around.optimizer not in ("adamw", "adamw8bit"):
        yield (
            "OptimizerInBackward.accumulate: AdamA needs Adam's moments, in more than 4 bits, for they are rounded "
            f"after each micro-batch, not {around.optimizer}. Set model.optimizer.name to adamw or adamw8bit."
        )


def in_backward(t: Techniques, around: Surroundings) -> Iterator[str]:
    """All gradients never exist together, and a step cannot be replayed."""
    if t.in_backward is None:
        return
    for reader in sorted(t.gradient_readers):
        yield f"{reader}: looks at gradients, which OptimizerInBackward has freed by then. Leave one of the two out."
    if around.clips:
        yield "OptimizerInBackward: the norm of all gradients is never known. Leave trainer.gradient_clip_val out."
    if around.precision == "16-mixed":
        yield "OptimizerInBackward: 16-mixed must see all gradients before it updates. Use bf16-mixed or bf16-true."
    if around.world_size > 1 and not around.shards:
        yield (
            "OptimizerInBackward: frees nothing with ddp, which keeps all gradients in its buffers. Use "
            "trainer.strategy=fsdp, or one device."
        )
    if around.offloads:
        yield (
            "OptimizerInBackward: with trainer.strategy.offload the device has no gradients to be freed, and torch "
            "before 2.13 updates while they are still being copied to the host. Leave one of the two out."
        )
    if t.recovery:
        yield (
            "OutOfMemoryRecovery: with OptimizerInBackward some parameters are updated already when memory runs "
            "out. Leave one of them out."
        )


def layer_major(t: Techniques, around: Surroundings) -> Iterator[str]:
    """It cuts the batch and keeps activations in its own way, and needs whole weights."""
    if t.slice_rows is None:
        return
    if t.micro_batch is not None or t.recovery:
        yield "LayerMajor: has a micro-batch of its own. Leave GradientAccumulation and OutOfMemoryRecovery out."
    if t.keep != "all":
        yield "LayerMajor: keeps only the inputs of blocks already. Leave ActivationCheckpointing out."
    if around.shards:
        yield (
            "LayerMajor: runs blocks inside an autograd function, where sharded parameters are not gathered. Use "
            "ActivationCheckpointing with FSDP2."
        )


def recovery(t: Techniques, around: Surroundings) -> Iterator[str]:
    """A failed pass of sharded weights cannot be replayed."""
    if t.recovery and around.shards:
        yield (
            "OutOfMemoryRecovery: sharded ranks exchange parameters inside the failed pass and cannot replay it. "
            "Choose a smaller micro-batch before the run."
        )


def loss_scaling(t: Techniques, around: Surroundings) -> Iterator[str]:
    """The scale is found from gradients that overflow."""
    if around.shards and "16-mixed" in (t.precision, around.precision):
        yield (
            "trainer.precision: 16-mixed looks for gradients that overflow, of which each rank has a part only. Use "
            "bf16-mixed."
        )


def selective(t: Techniques, around: Surroundings) -> Iterator[str]:
    """A compiled block is one operation."""
    if t.keep == "products" and around.compiles:
        yield "ActivationCheckpointing: a compiled block hides its products from keep=products. Use keep=input."


def host(t: Techniques, around: Surroundings) -> Iterator[str]:
    """The host of a CPU is the CPU."""
    if t.storage == "host" and around.device_type == "cpu":
        yield "ActivationOffload: on a CPU activations are in host memory already. Use to=disk."
    if around.offloads and around.device_type == "cpu":
        yield "trainer.strategy.offload: a CPU's memory is that of the host already. Leave it out, or use a GPU."


def pruning(t: Techniques, around: Surroundings) -> Iterator[str]:
    """A weight has one mask."""
    name, *others = sorted(t.masks) or [""]
    if others:
        yield f"{others[0]}: {name} sets weights to zero already. Leave one of them out."


def rounding(t: Techniques, around: Surroundings) -> Iterator[str]:
    """Scales are of weights in the dtype of the export."""
    if t.rounds and around.shards and around.precision == "bf16-mixed":
        yield (
            "QuantizationAwareTraining: with bf16-mixed shards are gathered in bfloat16, which rounds weights before "
            "they are rounded as in the file. Use 32-true, or ddp."
        )


def structured(t: Techniques, around: Surroundings) -> Iterator[str]:
    """Shapes may change in the middle of a run."""
    if t.removal_step == 0:
        return
    at_step = f"StructuredPruning.at_step: is {t.removal_step}, but"
    if around.shards:
        yield "trainer.strategy: shards the weights, and StructuredPruning has to see them whole. Use ddp."
    if around.world_size > 1:
        yield f"{at_step} several devices exchange gradients of fixed shapes. Give 0, or use one device."
    if t.masks:
        yield f"{at_step} the masks of {min(t.masks)} would no longer fit. Give 0."
