"""Memory techniques on two shards against one process, through the program as users call it."""

from __future__ import annotations

import json

import pytest

from tests.distributed.test_strategy import ADAMW, SHARDED, alike, fit, folder  # noqa: F401
from tests.training import read_scalars

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("launcher_socket")]


def overlay(*names):
    return [f"--config=configs/memory/{name}.yaml" for name in names]


def callback(name, **settings):
    return f"--trainer.callbacks+={json.dumps({'class_path': name, 'init_args': settings})}"


EXACT = 1e-6
PRUNED = [*ADAMW, callback("MovementPruning", final_sparsity=0.7, block_size=4)]
TECHNIQUES = {
    "exact": (EXACT, overlay("optimizer_in_backward", "adafactor", "quantization_aware")),
    "adama": (
        0.01,
        [*ADAMW, callback("GradientAccumulation", micro_batch=2), callback("OptimizerInBackward", accumulate=True)],
    ),
    "random": (0.01, overlay("bf16_true", "adamw_8bit", "optimizer_in_backward")),
}
"""Relative difference of losses from those of one process, and arguments. Roundings at random are others on shards."""


@pytest.mark.parametrize("name", TECHNIQUES)
def test_on_shards_as_on_one_process(folder, name):  # noqa: F811
    rel, arguments = TECHNIQUES[name]
    one, two = (read_scalars(fit(folder, f"{name}-{s}", "mlm", *arguments, strategy=s)) for s in (None, "fsdp"))
    alike(two, one, rel=rel)


def test_importance_goes_from_shards_to_one_device(folder):  # noqa: F811
    undisturbed = read_scalars(fit(folder, "whole", "mlm", *PRUNED))
    for root, more in (("moves", []), ("moves-in-shards", [SHARDED])):
        path = fit(folder, root, "mlm", *PRUNED, "--checkpoint.every_n_steps=7", *more, strategy="fsdp")
        alike(read_scalars(path), undisturbed)
        middle = path / "checkpoints" / "step-00000014.ckpt"
        assert middle.is_dir() == bool(more)
        fit(folder, root, "mlm", *PRUNED, f"--ckpt_path={middle}")
        alike(read_scalars(path), undisturbed)
        assert read_scalars(path)["pruning/sparsity"] == undisturbed["pruning/sparsity"]


def test_all_state_comes_back_from_shards(folder):  # noqa: F811
    """Importance, moments in 8 bits, weights in 16, and what rounds them."""
    given = [*overlay("bf16_true", "adamw_8bit"), *PRUNED[len(ADAMW) :], SHARDED, "--checkpoint.every_n_steps=4"]
    path = fit(folder, "bits", "mlm", *given, strategy="fsdp", steps=8)
    undisturbed = read_scalars(path)
    middle = path / "checkpoints" / "step-00000004.ckpt"
    fit(folder, "bits", "mlm", *given, f"--ckpt_path={middle}", strategy="fsdp", steps=8)
    assert (path / "checkpoints" / "abandoned-step-00000008.ckpt").is_dir()
    for tag in ("train/loss", "val/loss", "pruning/sparsity"):
        assert read_scalars(path)[tag] == pytest.approx(undisturbed[tag], rel=EXACT), tag
