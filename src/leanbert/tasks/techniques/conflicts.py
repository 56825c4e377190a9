"""What each technique cannot be combined with: whether that is so in a run, and the reason with the fix."""

from __future__ import annotations

from leanbert.optim.build import STATE_BITS
from leanbert.tasks.techniques.contract import Surroundings, Techniques

Conflicts = list[tuple[bool, str]]


def accumulation(t: Techniques, around: Surroundings) -> Conflicts:
    """Return the conflicts with updates within the backward pass of each micro-batch."""
    return [
        (
            t.in_backward == "update" and t.micro_batch is not None,
            "OptimizerInBackward: with gradient accumulation a parameter would be updated after each micro-batch. Use "
            "LayerMajor instead of GradientAccumulation (exact), or OptimizerInBackward.accumulate=true (AdamA).",
        ),
    ]


def adama(t: Techniques, around: Surroundings) -> Conflicts:
    """Return what AdamA conflicts with: one micro-batch, and other moments than Adam's."""
    adama = t.in_backward == "accumulate"
    return [
        (
            adama and t.micro_batch is None,
            "OptimizerInBackward.accumulate: has no effect without GradientAccumulation. Leave it out.",
        ),
        (
            adama and around.optimizer not in ("adamw", "adamw8bit"),
            f"OptimizerInBackward.accumulate: AdamA needs Adam's moments, in more than 4 bits, for they are rounded "
            f"after each micro-batch, not {around.optimizer}. Set model.optimizer.name to adamw or adamw8bit.",
        ),
    ]


def in_backward(t: Techniques, around: Surroundings) -> Conflicts:
    """Return the conflicts with what has to see all gradients, or to replay a step."""
    in_backward = t.in_backward is not None
    return [
        (
            in_backward and around.clips,
            "OptimizerInBackward: the norm of all gradients is never known. Leave trainer.gradient_clip_val out.",
        ),
        (
            in_backward and around.precision == "16-mixed",
            "OptimizerInBackward: 16-mixed must see all gradients before it updates. Use bf16-mixed or bf16-true.",
        ),
        (
            in_backward and around.world_size > 1,
            "OptimizerInBackward: gradients would be used before the ranks have exchanged them. Use one device.",
        ),
        (
            in_backward and t.recovery,
            "OutOfMemoryRecovery: with OptimizerInBackward some parameters are updated already when memory runs "
            "out. Leave one of them out.",
        ),
    ]


def layer_major(t: Techniques, around: Surroundings) -> Conflicts:
    """Return the conflicts with what cuts the batch or keeps activations otherwise, and sharded weights."""
    layer_major = t.slice_rows is not None
    return [
        (
            layer_major and (t.micro_batch is not None or t.recovery),
            "LayerMajor: has a micro-batch of its own. Leave GradientAccumulation and OutOfMemoryRecovery out.",
        ),
        (
            layer_major and t.keep != "all",
            "LayerMajor: keeps only the inputs of blocks already. Leave ActivationCheckpointing out.",
        ),
        (
            layer_major and around.shards,
            "LayerMajor: runs blocks inside an autograd function, where sharded parameters are not gathered. Use "
            "ActivationCheckpointing with FSDP2.",
        ),
    ]


def recovery(t: Techniques, around: Surroundings) -> Conflicts:
    """Return the conflicts with sharded weights."""
    return [
        (
            t.recovery and around.shards,
            "OutOfMemoryRecovery: sharded ranks exchange parameters inside the failed pass and cannot replay it. "
            "Choose a smaller micro-batch before the run.",
        ),
    ]


def adafactor(t: Techniques, around: Surroundings) -> Conflicts:
    """Return the conflicts with sharded weights."""
    return [
        (
            around.shards and around.optimizer == "adafactor",
            "model.optimizer.name: torch's adafactor cannot update sharded parameters. Use adamw or muon, or ddp.",
        ),
    ]


def sliced_update(t: Techniques, around: Surroundings) -> Conflicts:
    """Return the conflicts with sharded weights."""
    return [
        (
            around.shards and (around.optimizer in STATE_BITS or around.precision == "bf16-true"),
            "trainer.strategy: updates in slices (adamw8bit, adamw4bit, bf16-true) cannot run on sharded parameters. "
            "Use adamw or muon with 32-true or bf16-mixed, or ddp.",
        ),
    ]


def selective(t: Techniques, around: Surroundings) -> Conflicts:
    """Return the conflicts with compiled blocks."""
    return [
        (
            t.keep == "products" and around.compiles,
            "ActivationCheckpointing: a compiled block hides its products from keep=products. Use keep=input.",
        ),
    ]


def host(t: Techniques, around: Surroundings) -> Conflicts:
    """Return the conflicts with a CPU."""
    return [
        (
            t.storage == "host" and around.device_type == "cpu",
            "ActivationOffload: on a CPU activations are in host memory already. Use to=disk.",
        ),
    ]


def pruning(t: Techniques, around: Surroundings) -> Conflicts:
    """Return the conflicts with sharded weights."""
    return [
        (
            t.masks and around.shards,
            "trainer.strategy: shards the weights, and MagnitudePruning has to see them whole. Use ddp.",
        ),
    ]


def structured(t: Techniques, around: Surroundings) -> Conflicts:
    """Return the conflicts with what fixes the shapes of weights."""
    at_step = f"StructuredPruning.at_step: is {t.removal_step}, but"
    return [
        (
            t.removal_step > 0 and around.shards,
            "trainer.strategy: shards the weights, and StructuredPruning has to see them whole. Use ddp.",
        ),
        (
            t.removal_step > 0 and around.world_size > 1,
            f"{at_step} several devices exchange gradients of fixed shapes. Give 0, or use one device.",
        ),
        (
            t.removal_step > 0 and t.masks,
            f"{at_step} the masks of MagnitudePruning would no longer fit. Give 0.",
        ),
    ]
