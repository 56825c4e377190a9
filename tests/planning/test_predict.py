import gc

import pytest

from leanbert.data.mlm import MaskedLMData
from leanbert.errors import UserError
from leanbert.models.config import EncoderConfig
from leanbert.optim.build import OptimizerConfig
from leanbert.planning import overlays
from leanbert.planning.dry_run import RunSettings, rehearse
from leanbert.planning.predict import MicroBatches, predict
from leanbert.tasks.mlm import MaskedLM
from tests.corpus import write_corpus
from tests.training import fit

DEEP = {"num_layers": 9, "hidden_size": 32, "num_heads": 2}


def settings(*names, rows=16, micro_batch=None, optimizer="adamw", encoder=None, precision="32-true", length=32):
    task = MaskedLM(EncoderConfig(**{**DEEP, **(encoder or {})}), OptimizerConfig(name=optimizer, lr=1e-3))
    plain = RunSettings(task, MaskedLMData(vocab_size=300, max_length=length, batch_size=rows), (), precision)
    return overlays.apply(plain, overlays.merge([overlays.read(name, micro_batch) for name in names]))


@pytest.mark.parametrize(
    "names",
    [
        (), ("checkpointing",), ("selective_checkpointing",), ("accumulation",), ("layer_major",), ("chunked_head",),
        ("offload",), ("optimizer_in_backward",), ("bf16_mixed",), ("bf16_true", "adamw_4bit"), ("adafactor",),
        ("accumulation", "adama"), ("structured_pruning",), ("layer_major", "optimizer_in_backward", "adamw_8bit"),
    ],
)  # fmt: skip
def test_extrapolation_equals_the_whole_rehearsal(names):
    if names[-1:] == ("adama",):  # which brings its own accumulation
        names = ("adama",)
    run = settings(*names)
    quick, whole = predict(run), predict(run, exact=True)
    assert quick.flops == whole.flops
    assert quick.parameters == whole.parameters
    assert quick.peak_bytes == pytest.approx(whole.peak_bytes, rel=0.01)


def test_blocks_that_alternate_are_extrapolated_by_their_period():
    run = settings("checkpointing", encoder={"num_layers": 13, "local_window": 8})
    run.callbacks[0].every = 2
    assert predict(run).peak_bytes == predict(run, exact=True).peak_bytes


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
    "names", [(), ("checkpointing", "bf16_mixed"), ("accumulation", "adamw_8bit"), ("pruning",), ("lean",)]
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
            run.model.__class__(run.model.encoder_config, run.model.optimizer_config),
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


def test_the_users_objects_stay_as_they_are():
    run = settings("accumulation", "structured_pruning")
    rehearse(run, 16)
    assert run.task.model is None
    assert run.data.hparams["batch_size"] == 16
    assert not hasattr(run.data, "tokenizer")
    assert run.callbacks[0].schedule == {0: 8}


def test_what_a_run_would_refuse_is_refused():
    with pytest.raises(UserError, match="LayerMajor: has a micro-batch of its own"):
        predict(settings("layer_major", "accumulation", micro_batch=4))
    with pytest.raises(UserError, match="does not cut"):
        predict(settings("accumulation", rows=8))


@pytest.mark.parametrize(
    "names", [("accumulation",), ("accumulation", "checkpointing"), ("layer_major", "optimizer_in_backward")]
)
@pytest.mark.parametrize("chunk", [None, 40])
def test_two_micro_batches_foretell_all(names, chunk):
    """Also where the head is chunked, with 16 rows of 5 targets above its chunk."""

    def with_size(size):
        run = settings(*names, *(["chunked_head"] if chunk else []), micro_batch=size, encoder={"num_layers": 4})
        for callback in run.callbacks:
            if hasattr(callback, "targets"):
                callback.targets = chunk
        return run

    family = MicroBatches(with_size)
    for size in (2, 4, 8):
        found, direct = family.predict(size), predict(with_size(size), exact=True)
        assert found.peak_bytes == direct.peak_bytes
        assert found.by_phase == pytest.approx(direct.by_phase, rel=0.01)
        assert found.flops == direct.flops
    single = predict(with_size(1), exact=True).peak_bytes
    assert single <= family.predict(1).peak_bytes <= 1.02 * single
