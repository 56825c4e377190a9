"""Which steps there are, in which order, and what each does to a model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from leanbert.compression.steps import (
    METHODS,
    apply_steps,
    as_callbacks,
    inputs_seen,
    parse_steps,
    split_at_training,
    variants_of,
)
from leanbert.errors import UserError
from leanbert.models.packed_inputs import PackedInputs
from tests.compression.onnx.models import make


def run(model):
    model(PackedInputs.whole_rows(torch.randint(100, (4, 16), generator=torch.Generator().manual_seed(0))))


def test_steps_are_read_in_their_order():
    steps = parse_steps(["structured_pruning=0.5", "low_rank=0.9", "quantize=int8"])
    assert [str(step) for step in steps] == ["structured_pruning=0.5", "low_rank=0.9", "quantize=int8"]
    assert "+".join(step.slug for step in steps) == "structured_pruning-0.5+low_rank-0.9+int8"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (
            ["prune=0.5"],
            "'prune=0.5' is none. Give blocks=VALUE, structured_pruning=VALUE, pruning=VALUE, movement_pruning=VALUE, "
            "quantization_aware=VALUE, train=VALUE, low_rank=VALUE, low_rank_embedding=VALUE, quantize=VALUE",
        ),
        (["train=0"], "'train=0' needs a whole number from 1: optimizer steps"),
        (["train=1.5"], "'train=1.5' needs a whole number from 1: optimizer steps"),
        (["pruning=3:4"], "'pruning=3:4' needs a finite number from above 0 to below 1: fraction of all weights"),
        (["pruning=0.5:"], "'pruning=0.5:' needs"),
        (["pruning=0.5:1"], "'pruning=0.5:1' needs"),
        (["pruning=0.5:x"], "'pruning=0.5:x' needs"),
        (["pruning=2:4:16"], "'pruning=2:4:16' needs"),
        (["structured_pruning=0.5:16"], "'structured_pruning=0.5:16' needs"),
        (["blocks=0.5:taylor"], "'blocks=0.5:taylor' needs"),
        (["movement_pruning=0.5"], "movement_pruning=0.5 looks at how training moves weights. Add train=STEPS"),
        (["movement_pruning=0.5", "quantize=int8"], "movement_pruning=0.5 looks at how training moves weights. Add"),
        (["pruning=2:4", "movement_pruning=0.5"], "movement_pruning=0.5 after pruning=2:4 sets weights to"),
        (["movement_pruning=0.5", "train=1", "low_rank=0.9"], "low_rank=0.9 after movement_pruning=0.5 would fill"),
        (
            ["blocks=0.5", "structured_pruning=0.5:taylor", "train=90"],
            "structured_pruning=0.5:taylor is measured in the first 20 steps of training, with all blocks",
        ),
        (
            ["structured_pruning=0.5:taylor", "train=20"],
            "structured_pruning=0.5:taylor is measured in the first 20 steps of training, with all blocks",
        ),
        (["train=9", "blocks=0.5"], "blocks=0.5 cannot follow train=9. Put them in the order blocks, structured"),
        (["pruning=0.5", "low_rank=0.9"], "low_rank=0.9 after pruning=0.5 would fill the zeros again. Leave one"),
        (["quantize=int3"], "'quantize=int3'. Give quantize=int8 or quantize=int4"),
        (
            ["quantization_aware=0.5"],
            "'quantization_aware=0.5'. Give quantization_aware=int8 or quantization_aware=int4",
        ),
        (
            ["quantization_aware=int4", "quantize=int4"],
            "quantization_aware=int4 is how train trains. Add train=STEPS after",
        ),
        (
            ["quantization_aware=int4", "train=9"],
            "quantization_aware=int4 needs the same at the end. Add qu",
        ),
        (
            ["quantization_aware=int4", "train=9", "quantize=int8"],
            "quantization_aware=int4 needs the same",
        ),
        (
            ["quantization_aware=int4", "train=9", "low_rank=0.9", "quantize=int4"],
            "low_rank makes other matrices than quantization_aware=int4 has rounded. Leave one out",
        ),
        (
            ["train=9", "quantization_aware=int4"],
            "quantization_aware=int4 cannot follow train=9. Put them in the order",
        ),
        (["low_rank=1"], "'low_rank=1' needs a finite number from 0 to below 1"),
        (["low_rank=x"], "'low_rank=x' needs"),
        (["low_rank"], "'low_rank' needs"),
        (["low_rank=nan"], "'low_rank=nan' needs"),
        (["quantize=int8", "low_rank=0.9"], "low_rank=0.9 cannot follow quantize=int8. Put them in the order"),
        (["low_rank=0.9", "structured_pruning=0.5"], "structured_pruning=0.5 cannot follow low_rank=0.9"),
        (["low_rank=0.9", "low_rank=0.8"], "low_rank=0.8 is there twice"),
    ],
)
def test_what_cannot_be_is_said(texts, message):
    with pytest.raises(UserError) as caught:
        parse_steps(texts)
    assert str(caught.value).startswith(f"steps: {message.replace(' from 0 to below 1', '')}")


def test_each_step_acts_on_what_the_one_before_has_left():
    model, _ = make("tagging", hidden_size=64, num_heads=4, intermediate_size=128)
    assert apply_steps(model, parse_steps(["structured_pruning=0.5"]), run) is None
    assert (model.config.num_heads, model.config.intermediate_size) == (2, 64)
    assert model.blocks[0].attention.output.weight.shape == (64, 32)
    before = sum(parameter.numel() for parameter in model.parameters())
    assert apply_steps(model, parse_steps(["low_rank=0.5", "quantize=int4"]), run) == "int4"
    assert sum(parameter.numel() for parameter in model.parameters()) < before
    run(model)


def test_what_a_model_reads_is_recorded_for_static_scales():
    model, _ = make("tagging")
    ((seen,),) = inputs_seen(model, run)
    assert torch.equal(seen.input_ids, torch.randint(100, (4, 16), generator=torch.Generator().manual_seed(0)))
    run(model)
    assert not model.encoder._forward_pre_hooks
    packed = PackedInputs.whole_rows(torch.arange(8)[None])
    packed = replace(packed, document_ids=torch.tensor([[0, 0, 0, 1, 1, -1, -1, -1]]))
    ((seen,),) = inputs_seen(model, lambda model: model(packed))
    assert seen.input_ids.tolist() == [[0, 1, 2], [3, 4, 0]]
    assert seen.real.tolist() == [[True, True, True], [True, True, False]]
    sources, targets = (PackedInputs.whole_rows(ids[None]) for ids in (torch.arange(8), torch.arange(50, 55)))
    ((read, written),) = inputs_seen(make("seq2seq")[0], lambda model: model(sources, targets))
    assert (read.input_ids.tolist(), written.input_ids.tolist()) == ([[*range(8)]], [[*range(50, 55)]])


def test_a_step_without_effect_is_an_error():
    model, _ = make("tagging")
    with pytest.raises(UserError, match=r"^structured_pruning=0\.001: 0\.001 of 2 heads and 0\.001 of 84 n"):
        apply_steps(model, parse_steps(["structured_pruning=0.001"]), run)
    with pytest.raises(UserError, match=r"^blocks=0\.01: 0\.01 of 2 blocks is less than one"):
        apply_steps(model, parse_steps(["blocks=0.01"]), run)
    with pytest.raises(UserError, match=r"^pruning=2:4: no matrix of this model consists of such groups"):
        METHODS["pruning"].apply(torch.nn.Linear(6, 8), "2:4", run)
    with pytest.raises(UserError, match=r"^pruning=0\.5:7: no matrix of this model consists of such groups"):
        apply_steps(model, parse_steps(["pruning=0.5:7"]), run)
    with pytest.raises(UserError, match=r"^low_rank: encoder\.blocks\.0\.attention\.qkv was not run"):
        apply_steps(model, parse_steps(["low_rank=0.9"]), lambda model: None)


@pytest.mark.parametrize(
    ("value", "zeros", "rows", "columns"),
    [("0.75", 0.75, 1, 1), ("2:4", 0.5, 1, 4), ("4:8", 0.5, 1, 8), ("0.75:8", 0.75, 8, 8)],
)
def test_single_weights_or_groups_become_zero(value, zeros, rows, columns):
    model, _ = make("tagging")
    apply_steps(model, parse_steps([f"pruning={value}"]), run)
    kinds = (torch.nn.Linear, torch.nn.Embedding) if value == "0.75" else (torch.nn.Linear,)
    matrices = [module.weight for module in model.modules() if isinstance(module, kinds)]
    groups = [
        (matrix == 0).unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).sum((1, 3)).flatten()
        for matrix in matrices
        if matrix.shape[0] % rows == matrix.shape[1] % columns == 0
    ]
    assert groups
    found = torch.cat(groups)
    if ":" in value:
        allowed = {0, 64} if rows == 8 else {columns // 2}
        assert set(found.unique().tolist()) == allowed
    assert int(found.sum()) == pytest.approx(zeros * rows * columns * len(found), abs=rows * columns)


def test_steps_before_training_are_callbacks_of_the_run():
    steps = parse_steps(["blocks=0.5", "structured_pruning=0.25", "pruning=2:4", "train=70", "quantize=int8"])
    cuts, count, rest = split_at_training(steps)
    assert (count, [str(step) for step in rest]) == (70, ["quantize=int8"])
    assert as_callbacks(cuts) == [
        {"class_path": "StructuredPruning", "init_args": {"heads": 0.25, "neurons": 0.25, "blocks": 0.5}},
        {"class_path": "MagnitudePruning", "init_args": {"final_sparsity": 0.5, "scope": "2:4"}},
    ]
    assert [len(each) for each in variants_of(steps)] == [1, 2, 3, 4, 5]
    rounded = ["pruning=0.5", "quantization_aware=int8_int4", "train=9", "quantize=int8_int4"]
    assert as_callbacks(split_at_training(parse_steps(rounded))[0])[1:] == [
        {"class_path": "QuantizationAwareTraining", "init_args": {"scheme": "int8_int4"}}
    ]
    assert [len(each) for each in variants_of(parse_steps(rounded))] == [1, 3, 4]
    assert as_callbacks(parse_steps(["blocks=0.5"]))[0]["init_args"] == {"heads": 0.0, "neurons": 0.0, "blocks": 0.5}
    assert split_at_training(rest) == ([], 0, rest)
    steps = parse_steps(["movement_pruning=0.8:16", "train=70"])
    assert as_callbacks(steps[:1]) == [
        {"class_path": "MovementPruning", "init_args": {"final_sparsity": 0.8, "block_size": 16}}
    ]
    assert as_callbacks(parse_steps(["pruning=0.8"]))[0]["init_args"] == {
        "final_sparsity": 0.8, "include_embeddings": True,
    }  # fmt: skip
    parse_steps(["blocks=0.5", "structured_pruning=0.5:taylor"])  # without training blocks may leave
    parse_steps(["structured_pruning=0.5:taylor", "train=21"])
    assert as_callbacks(parse_steps(["structured_pruning=0.5:taylor"]))[0]["init_args"] == {
        "heads": 0.5, "neurons": 0.5, "importance": "taylor", "at_step": 20,
    }  # fmt: skip


def test_each_step_makes_a_variant_but_what_only_training_does():
    steps = parse_steps(["blocks=0.5", "movement_pruning=4:8", "train=70", "quantize=int8"])
    assert ["+".join(step.slug for step in some) for some in variants_of(steps)] == [
        "blocks-0.5",
        "blocks-0.5+movement_pruning-4-8+train-70",
        "blocks-0.5+movement_pruning-4-8+train-70+int8",
    ]


def test_heads_and_neurons_leave_by_the_gradients_of_the_loss():
    """Of two models that are alike the later heads are small in one, and get no gradient in the other."""
    later = torch.arange(64) >= 32

    def calibrate(model, after_backward=None):
        assert after_backward is not None
        for _ in range(2):
            inputs = PackedInputs.whole_rows(torch.randint(100, (4, 16), generator=torch.Generator().manual_seed(0)))
            model(inputs, torch.arange(16).expand(4, 16)).square().sum().backward()
            after_backward()
            model.zero_grad(set_to_none=True)

    model, _ = make("tagging", hidden_size=64, num_heads=4, intermediate_size=128)
    weights = [block.attention.output.weight for block in model.blocks]
    with torch.no_grad():
        for weight in weights:
            weight[:, later] *= 10.0
    before = [weight.detach().clone() for weight in weights]
    handles = [weight.register_hook(lambda gradient: gradient * ~later) for weight in weights]
    apply_steps(model, parse_steps(["structured_pruning=0.5:taylor"]), calibrate)
    for handle in handles:
        handle.remove()
    for block, old in zip(model.blocks, before, strict=True):
        assert torch.equal(block.attention.output.weight, old[:, ~later])


@pytest.mark.parametrize("path", sorted(Path("configs/compress").glob("*.yaml")), ids=lambda path: path.stem)
def test_steps_of_overlays_can_be(path):
    texts = yaml.safe_load(path.read_text(encoding="utf-8"))["steps+"]
    assert [str(step) for step in parse_steps(texts)] == texts
