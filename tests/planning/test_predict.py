import gc

import pytest

from leanbert.data.mlm import MaskedLMData
from leanbert.errors import UserError
from leanbert.models.config import EncoderConfig
from leanbert.optim.build import OptimizerConfig
from leanbert.planning import overlays
from leanbert.planning.dry_run import dry_run
from leanbert.planning.predict import predict
from leanbert.planning.run_settings import RunSettings
from leanbert.tasks.mlm import MaskedLM
from tests.corpus import write_corpus
from tests.training import fit

DEEP = {"num_layers": 9, "hidden_size": 32, "num_heads": 2}


def settings(*names, rows=16, micro_batch=None, optimizer="adamw", encoder=None, precision="32-true", length=32):
    task = MaskedLM(
        encoder=EncoderConfig(**{**DEEP, **(encoder or {})}), optimizer=OptimizerConfig(name=optimizer, lr=1e-3)
    )
    plain = RunSettings(task, MaskedLMData(vocab_size=300, max_length=length, batch_size=rows), (), precision)
    return overlays.apply(plain, overlays.merge([overlays.read(name, micro_batch) for name in names]))


@pytest.mark.parametrize("names", [("accumulation",), ("accumulation", "checkpointing", "adamw_8bit"), ("adama",)])
def test_two_micro_batches_need_what_all_need(names):
    run = settings(*names, micro_batch=2, encoder={"num_layers": 3})
    for callback in run.callbacks:
        if hasattr(callback, "schedule"):
            callback.schedule = {0: 2}
    found, whole = predict(run), dry_run(run, 16)
    phases = {**whole.step.by_phase, **whole.validation.by_phase}
    assert found.by_phase == pytest.approx(phases, abs=64)  # the losses of six micro-batches, 4 bytes each
    assert found.flops == whole.flops + whole.update_flops


def test_nothing_is_allocated():
    """A model of 10 billion parameters; its bytes are those of the arithmetic."""
    huge = settings(encoder={"num_layers": 50, "hidden_size": 4096, "num_heads": 32}, rows=2)
    found = predict(huge)
    assert found.parameters > 10e9
    phases = found.phases["optimizer"]
    assert phases["parameters"] >= 4 * found.parameters
    assert phases["optimizer"] >= 8 * found.parameters


def test_the_micro_batch_decides_over_activations_alone():
    by_rows = {rows: predict(settings("accumulation", micro_batch=rows)) for rows in (1, 2, 4)}
    activations = [found.phases["forward"]["activations"] for found in by_rows.values()]
    assert activations[1] - activations[0] == pytest.approx((activations[2] - activations[1]) / 2, rel=0.02)
    assert len({found.flops for found in by_rows.values()}) == 1
    assert len({found.phases["optimizer"]["optimizer"] for found in by_rows.values()}) == 1


def test_checkpointing_adds_a_forward_pass_of_the_blocks_but_the_last_product():
    plain, checkpointed = predict(settings()), predict(settings("checkpointing"))
    assert plain.flops < checkpointed.flops < plain.flops * 4 / 3


@pytest.mark.parametrize(
    "names",
    [
        (),
        ("checkpointing", "bf16_mixed"),
        ("accumulation", "adamw_8bit"),
        ("pruning",),
        ("movement_pruning",),
        ("quantization_aware",),
        ("checkpointing", "quantization_aware"),
        ("lean",),
    ],
)
def test_a_run_has_the_predicted_peak(tmp_path, names):
    """By the monitor of a real run; benchmarks/plan.py measures with torch's profiler."""
    write_corpus(tmp_path / "train.txt")
    gc.collect()  # what tests before this one have left would go in the middle, after the highest point
    sizes = ["--model.encoder.num_layers=5", "--data.batch_size=16"]
    run = fit(tmp_path, *sizes, overlays=names, steps=3)
    measured = next(c for c in run.trainer.callbacks if type(c).__name__ == "MemoryMonitor").summary()
    found = predict(
        RunSettings(
            run.model.__class__(encoder=run.model.encoder_config, optimizer=run.model.optimizer_config),
            MaskedLMData(vocab_size=300, max_length=32, batch_size=16,
                         val_batch_size=run.datamodule.hparams["val_batch_size"]),
            settings(*names).callbacks,
            "32-true",
            vocab_size=run.datamodule.tokenizer.vocab_size,
        )
    )  # fmt: skip
    for name in ("parameters", "gradients", "optimizer", "activations"):
        assert found.by_category[name] == pytest.approx(measured["by_category"][name], rel=0.01, abs=4096), name
    # tests before this one may have left tensors in the process, which the monitor counts as other
    peaks = (sum(found.by_category.values()) - found.by_category["other"],
             measured["peak_bytes"] - measured["by_category"]["other"])  # fmt: skip
    assert peaks[0] == pytest.approx(peaks[1], rel=0.01)


def test_masks_and_importance_are_planned_and_measured(tmp_path):
    """Of each block of 32 the linear layers, of which 84 neurons come in fours, and that of the head."""
    write_corpus(tmp_path / "train.txt")

    def measured(*names):
        gc.collect()
        # the monitor looks at the second step, before which all is pruned
        run = fit(tmp_path, "--model.encoder.num_layers=1", "--data.batch_size=16", overlays=names, steps=2)
        return next(c for c in run.trainer.callbacks if type(c).__name__ == "MemoryMonitor").peaks

    weights = 96 * 32 + 32 * 32 + 168 * 32 + 32 * 84 + 32 * 32
    plain = predict(settings(encoder={"num_layers": 1})).phases
    measured()  # leaves the same behind as all that follow
    bare = measured()
    for name, bytes_a_weight in (("pruning", 1), ("pruning_2_4", 1), ("movement_pruning", 5)):
        planned = predict(settings(name, encoder={"num_layers": 1})).phases
        for before, after in ((plain, planned), (bare, measured(name))):
            for phase in ("forward", "backward", "optimizer"):
                more = {key: after[phase][key] - value for key, value in before[phase].items()}
                assert more == {**dict.fromkeys(more, 0), "other": bytes_a_weight * weights}, (name, phase)


def test_what_a_run_would_refuse_is_refused():
    with pytest.raises(UserError, match="LayerMajor: has a micro-batch of its own"):
        predict(settings("layer_major", "accumulation", micro_batch=4))
    with pytest.raises(UserError, match="does not cut"):
        predict(settings("accumulation", rows=8))
