"""Memory and communication of several devices, against numbers that follow from the sizes of a tiny model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from leanbert.callbacks.techniques.accumulation import GradientAccumulation
from leanbert.callbacks.techniques.activations import ChunkedHead, LayerMajor
from leanbert.callbacks.techniques.optimizer import OptimizerInBackward
from leanbert.callbacks.techniques.pruning import MagnitudePruning
from leanbert.data.mlm import MaskedLMData
from leanbert.distributed.sharding import pretend_group
from leanbert.errors import UserError
from leanbert.memory.precision import has_16_bit_products
from leanbert.models.config import EncoderConfig
from leanbert.models.mlm import MaskedLanguageModel
from leanbert.optim.build import OptimizerConfig, build_optimizer
from leanbert.planning.distributed import predict_distributed
from leanbert.planning.predict import predict
from leanbert.planning.run_settings import RunSettings
from leanbert.pretrained.build import build_model
from leanbert.tasks.mlm import MaskedLM

VOCABULARY = 256
DEVICES = 4


def encoder(layers=3):  # each first dimension is divisible by 4, but for the 2 segments
    return EncoderConfig(
        preset="bert", num_layers=layers, hidden_size=32, num_heads=2, intermediate_size=64, max_positions=32
    )


def settings(*callbacks, layers=3, optimizer="adamw", precision="32-true", batch_size=16) -> RunSettings:
    task = MaskedLM(encoder=encoder(layers), optimizer=OptimizerConfig(name=optimizer))
    data = MaskedLMData(vocab_size=VOCABULARY, max_length=32, batch_size=batch_size)
    return RunSettings(task, data, tuple(callbacks), precision, vocab_size=VOCABULARY)


def parameter_bytes(multiple=1) -> tuple[int, int]:
    """Return float32 bytes in blocks and outside of them, with first dimensions rounded up as equal shards need it."""
    model: nn.Module = build_model(encoder(), VOCABULARY)

    def count(module):
        return sum(-(-p.shape[0] // multiple) * multiple * p[0].numel() * 4 for p in module.parameters())

    return count(model.encoder.blocks), count(model) - count(model.encoder.blocks)


def test_one_device_is_the_plain_prediction():
    for strategy in ("ddp", "fsdp2"):
        result = predict_distributed(settings(), 1, strategy)
        assert result == predict(settings())
        assert result.sent_bytes == 0


def test_ddp_adds_a_copy_of_the_gradients_and_reduces_it_once():
    gradients = sum(parameter_bytes())
    alone = predict(replace(settings(), rows=4))
    for callbacks in ([], [GradientAccumulation(2)]):
        result = predict_distributed(settings(*callbacks), DEVICES, "ddp")
        assert result.collectives == {"all_reduce": 2 * 3 * gradients // 4}
        assert result.sent_bytes == 2 * 3 * gradients // 4
    plain = predict_distributed(settings(), DEVICES, "ddp")
    assert plain.by_phase == {phase: size + gradients for phase, size in alone.by_phase.items()}
    assert plain.phases["optimizer"]["gradients"] == 2 * gradients
    assert plain.flops == alone.flops


def test_ddp_gradients_in_bfloat16_are_half_as_much():
    result = predict_distributed(settings(precision="bf16-true"), DEVICES, "ddp")
    assert result.sent_bytes == 3 * sum(parameter_bytes()) // 4


def test_fsdp2_shards_what_stays():
    whole, padded = sum(parameter_bytes()), sum(parameter_bytes(DEVICES))
    assert padded - whole == 2 * 32 * 4  # two rows of segments
    update = predict_distributed(settings(), DEVICES, "fsdp2").phases["optimizer"]
    assert update["parameters"] == update["gradients"] == padded // 4
    alone = predict(replace(settings(), rows=4)).phases["optimizer"]
    counters = alone["optimizer"] - 2 * whole  # of steps, which each device has
    assert 0 < counters < 400
    assert update["optimizer"] == 2 * padded // 4 + counters


def test_fsdp2_gathers_blocks_twice_and_the_rest_once():
    blocks, rest = parameter_bytes(DEVICES)
    result = predict_distributed(settings(), DEVICES, "fsdp2")
    assert result.collectives == {
        "all_gather": 3 * (2 * blocks + rest) // 4,
        "reduce_scatter": 3 * (blocks + rest) // 4,
    }
    forward = result.phases["forward"]
    assert forward["parameters"] == (blocks + rest) // 4 + rest + 2 * blocks // 3  # a block in use, and as it came


def test_a_teacher_is_in_shards_and_gathered_once(monkeypatch):
    config = replace(encoder(), vocab_size=VOCABULARY).resolved()
    monkeypatch.setattr("leanbert.planning.dry_run.blank_model", lambda _: MaskedLanguageModel(config))
    blocks, rest = parameter_bytes(DEVICES)
    run = settings(batch_size=32)
    run.task.teacher_source = "teacher"
    for callbacks, micro_batches in (((), 1), ((GradientAccumulation(2), ChunkedHead(4)), 4)):
        found = predict_distributed(replace(run, callbacks=callbacks), DEVICES, "fsdp2")
        assert found.collectives == {
            "all_gather": 3 * (3 * blocks + 2 * rest) // 4 * micro_batches,  # the student's blocks twice
            "reduce_scatter": 3 * (blocks + rest) // 4,
        }
        assert found.phases["optimizer"]["parameters"] == 2 * (blocks + rest) // 4


def test_mixed_precision_gathers_half_as_many_bytes():
    plain, mixed = (
        predict_distributed(settings(precision=kind), DEVICES, "fsdp2") for kind in ("32-true", "bf16-mixed")
    )
    sent = plain.collectives
    assert mixed.collectives == {**sent, "all_gather": sent["all_gather"] // 2}


def test_fsdp2_gathers_for_each_micro_batch_and_reduces_whole_gradients_once():
    once = predict_distributed(settings(batch_size=32), DEVICES, "fsdp2")
    result = predict_distributed(settings(GradientAccumulation(2), batch_size=32), DEVICES, "fsdp2")
    sent = once.collectives
    assert result.collectives == {**sent, "all_gather": 4 * sent["all_gather"]}
    assert result.phases["backward"]["gradients"] >= sum(parameter_bytes())


def test_fsdp2_reduces_the_norm_once_per_step():
    clipped = replace(settings(GradientAccumulation(1)), clip=1.0)
    more, fewer = (predict_distributed(replace(clipped, rows=rows), DEVICES, "fsdp2") for rows in (4, 2))
    norms = fewer.collectives["all_reduce"]
    assert more.collectives["all_reduce"] == norms > 0
    assert more.collectives["all_gather"] == 2 * fewer.collectives["all_gather"]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_adama_reduces_the_gradients_of_each_micro_batch(count):
    once = predict_distributed(replace(settings(), rows=1), DEVICES, "fsdp2")
    run = replace(settings(GradientAccumulation(1), OptimizerInBackward(accumulate=True)), rows=count)
    sent = predict_distributed(run, DEVICES, "fsdp2").collectives
    assert sent == {kind: count * size for kind, size in once.collectives.items()}


def offloaded(run, devices=DEVICES):
    """Return what is predicted of shards, on the device and in host memory."""
    around = replace(run, strategy="fsdp2", devices=devices, rows=16 // devices)
    return [predict(replace(around, offload=each)) for each in (False, True)]


def test_offloaded_shards_are_not_in_the_memory_of_a_device():
    plain, apart = offloaded(replace(settings(), device_type="cuda"))
    shards = sum(parameter_bytes(DEVICES)) // DEVICES
    update = apart.phases["optimizer"]
    assert update["parameters"] == update["gradients"] == 0
    assert update["optimizer"] < 400  # counters of steps
    validation = [each.phases["validation"]["parameters"] for each in (plain, apart)]
    assert validation[0] - validation[1] == shards
    backward = [sum(each.phases["backward"].values()) for each in (plain, apart)]
    assert backward[0] - backward[1] == 3 * shards  # and moments; at the peak there are no gradients yet
    assert apart.collectives == plain.collectives
    assert apart.flops == plain.flops


def test_offloaded_gradients_of_each_micro_batch_are_reduced():
    run = replace(settings(), device_type="cuda")
    once = offloaded(run)[1]
    plain, apart = offloaded(replace(run, callbacks=(GradientAccumulation(1),)))
    assert apart.collectives == {kind: 4 * size for kind, size in once.collectives.items()}
    assert plain.phases["backward"]["gradients"] >= sum(parameter_bytes())
    assert apart.phases["backward"]["gradients"] < sum(parameter_bytes()) / 2


def test_one_device_has_what_it_gathers_of_offloaded_shards():
    whole, (_, rest) = sum(parameter_bytes()), parameter_bytes()
    plain, apart = offloaded(replace(settings(), device_type="cuda"), devices=1)
    assert plain.phases["optimizer"]["parameters"] == whole
    update = apart.phases["optimizer"]
    assert update["parameters"] == update["gradients"] == 0
    assert update["optimizer"] < 400
    assert apart.phases["forward"]["parameters"] == rest  # scores are made when no block is there


def test_on_a_cpu_nothing_is_offloaded():
    with pytest.raises(UserError, match=r"trainer\.strategy\.offload: a CPU's memory"):
        offloaded(settings())


def test_muon_gathers_each_matrix_on_one_device_and_hands_it_out_again():
    plain, muon = (predict_distributed(settings(optimizer=name), DEVICES, "fsdp2") for name in ("adamw", "muon"))
    matrices = build_optimizer(build_model(encoder(), VOCABULARY), OptimizerConfig(name="muon")).optimizers[0]
    numbers = 3 * sum(weight.numel() for weight in matrices.param_groups[0]["params"]) // 16
    width = 2 if has_16_bit_products("cpu") else 4  # of what the iteration makes; three of four send a quarter each
    assert muon.collectives == {**plain.collectives, "gather": numbers * 4, "scatter": numbers * width}


def test_validation_batch_is_shared():
    run = settings()
    run.data.hparams["val_batch_size"] = 32
    shared = predict_distributed(run, DEVICES, "ddp").phases["validation"]["activations"]
    run.data.hparams["val_batch_size"] = 8
    assert shared == predict(run).phases["validation"]["activations"]


def test_batch_that_cannot_be_shared():
    with pytest.raises(UserError, match=r"data\.batch_size: 16 .* by 10 devices"):
        predict_distributed(settings(), 10, "ddp")


@pytest.mark.parametrize(
    ("run", "strategy", "reason"),
    [
        (settings(LayerMajor(2)), "fsdp2", "LayerMajor: runs blocks inside an autograd function"),
    ],
)
def test_refused_as_in_a_run(run, strategy, reason):
    with pytest.raises(UserError, match=reason):
        predict_distributed(run, DEVICES, strategy)
    assert not dist.is_initialized()


def test_group_is_gone_after_an_error(monkeypatch):
    def fail(*_, **__):
        assert dist.get_world_size() == DEVICES
        raise RuntimeError("in the middle")

    monkeypatch.setattr("leanbert.planning.predict.dry_run", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        predict_distributed(settings(), DEVICES, "fsdp2")
    assert not dist.is_initialized()


def test_refuses_inside_a_distributed_run():
    with pretend_group(2):
        with pytest.raises(UserError, match="process of its own"):
            predict_distributed(settings(), DEVICES, "fsdp2")
        assert dist.get_world_size() == 2  # the run's group is still there
    assert not dist.is_initialized()


def test_storages_are_resized_as_before():
    resize = torch.UntypedStorage.resize_
    predict_distributed(settings(), DEVICES, "fsdp2")
    assert torch.UntypedStorage.resize_ is resize


@pytest.mark.parametrize("run", [settings(optimizer="adamw8bit"), settings(precision="bf16-true")])
def test_fsdp2_shards_state_in_few_bits(run):
    alone, shared = predict(replace(run, rows=4)), predict_distributed(run, DEVICES, "fsdp2")
    state = shared.phases["forward"]["optimizer"]
    assert state == pytest.approx(alone.phases["forward"]["optimizer"] / DEVICES, rel=0.01)


def test_fsdp2_shards_masks():
    plain, pruned = (
        predict_distributed(settings(*callbacks), DEVICES, "fsdp2").phases["backward"]["other"]
        for callbacks in ((), (MagnitudePruning(include_embeddings=True),))
    )
    matrices = [p for p in build_model(encoder(), VOCABULARY).parameters() if p.ndim == 2]
    masked = sum(-(-p.shape[0] // DEVICES) * p.shape[1] for p in matrices)
    assert pruned - plain == masked


def test_in_the_backward_pass_fsdp2_has_the_gradients_of_one_block():
    run = settings(layers=12)
    plain, freed = (
        predict_distributed(replace(run, callbacks=c), DEVICES, "fsdp2") for c in ((), (OptimizerInBackward(),))
    )
    gradients = [each.phases["optimizer"]["gradients"] for each in (plain, freed)]
    assert gradients[1] < gradients[0] / 2
    assert freed.sent_bytes == plain.sent_bytes
