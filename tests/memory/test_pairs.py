"""Every pair of techniques on a tiny model: what can combine trains as each alone does, the rest is refused."""

import itertools
from contextlib import nullcontext
from dataclasses import dataclass, field

import pytest
import torch

from leanbert.compression.pruning import apply_masks, magnitude_masks, prunable
from leanbert.compression.rounding import set_rounding
from leanbert.errors import UserError
from leanbert.memory.finite import StepCheck
from leanbert.memory.recovery import retry_smaller
from leanbert.memory.step import optimizer_step
from leanbert.models.seq2seq import Seq2SeqModel
from leanbert.optim.build import OptimizerConfig, build_optimizer
from leanbert.optim.in_backward import accumulate_in_backward, update_in_backward
from leanbert.tasks.techniques import Surroundings, Techniques, apply, refuse
from tests.pretrained.pairs import packed_batch, tiny_seq2seq
from tests.tiny import PlainTask, tiny_model, unequal_batch


@dataclass
class Technique:
    """One row of the matrix: its settings, and how far two steps with it may move a parameter (1e-6: exact)."""

    settings: dict = field(default_factory=dict)
    optimizer: str | None = None
    micro_batch: int | None = None
    dtype: torch.dtype | None = None
    autocast: torch.dtype | None = None
    sparsity: float | None = None
    scheme: str | None = None
    moves: float = 1e-6


ROWS = {
    "accumulation": Technique({"micro_batch": 3}, micro_batch=3),
    "recovery": Technique({"recovery": True}),
    "checkpointing": Technique({"keep": "input"}),
    "selective": Technique({"keep": "products"}),
    "offload": Technique({"storage": "disk"}),
    "layer_major": Technique({"slice_rows": 3}),
    "chunked_head": Technique({"head_chunk": 5}),
    "in_backward": Technique({"in_backward": "update"}),
    "structured": Technique({"structured": (0.5, 0.5, 0.0)}, moves=float("inf")),
    "pruning": Technique(sparsity=0.5, moves=float("inf")),
    "rounding": Technique(scheme="int4", moves=float("inf")),
    "adama": Technique({"in_backward": "accumulate", "micro_batch": 3}, micro_batch=3, moves=4.1e-3),
    "adamw8bit": Technique(optimizer="adamw8bit", moves=4.1e-3),
    "adamw4bit": Technique(optimizer="adamw4bit", moves=4.1e-3),
    "adafactor": Technique(optimizer="adafactor", moves=0.1),
    "bf16_mixed": Technique(autocast=torch.bfloat16, dtype=torch.float32, moves=4.1e-3),
    "bf16_true": Technique(dtype=torch.bfloat16, moves=2e-2),
}
"""Two AdamW steps at a rate of 1e-3 move a parameter by at most about 2e-3, here or there: 4e-3 apart."""
SAME_SETTING = [
    {"checkpointing", "selective"},
    {"accumulation", "adama"},
    {"in_backward", "adama"},
    {"adamw8bit", "adamw4bit", "adafactor"},
    {"bf16_mixed", "bf16_true"},
]
REFUSED = {
    frozenset(pair)
    for pair in [
        ("in_backward", "accumulation"),
        ("in_backward", "recovery"),
        ("layer_major", "accumulation"),
        ("layer_major", "recovery"),
        ("layer_major", "adama"),
        ("layer_major", "checkpointing"),
        ("layer_major", "selective"),
        ("adama", "recovery"),
        ("adama", "adafactor"),
        ("adama", "adamw4bit"),
    ]
}


def merged(names, folder):
    settings = {key: value for name in names for key, value in ROWS[name].settings.items()}
    if settings.get("storage") == "disk":
        settings["storage"] = folder
    return Techniques(**settings)


def setting(names, attribute, default):
    return next((v for v in (getattr(ROWS[name], attribute) for name in names) if v is not None), default)


def train(names, folder, make=lambda: tiny_model(dtype=torch.float64, preset="bert")):
    techniques, optimizer_name = merged(names, folder), setting(names, "optimizer", "adamw")
    refuse(techniques, Surroundings(optimizer_name, "32-true"))
    model = make()
    model.to(setting(names, "dtype", torch.float64))
    apply(techniques, model)
    adama = techniques.in_backward == "accumulate"
    optimizer = build_optimizer(model, OptimizerConfig(name=optimizer_name, lr=1e-3), sliced=adama)
    micro_batch, place = setting(names, "micro_batch", None), [0]
    if adama:
        accumulate_in_backward(model, optimizer, lambda: (place[0], 3), StepCheck().guard)
    elif techniques.in_backward == "update":
        update_in_backward(model, optimizer, StepCheck().guard)
    kind = setting(names, "autocast", None)
    masks = {}
    if (sparsity := setting(names, "sparsity", None)) is not None:
        weights = prunable(model)
        masks = magnitude_masks(weights, sparsity, "global")
        apply_masks(weights, masks)
    set_rounding(model, setting(names, "scheme", None))
    for step in range(2):
        with torch.autocast("cpu", kind) if kind else nullcontext():

            def attempt(step=step):
                return optimizer_step(
                    *task_and_batch(model, step), optimizer, micro_batch=micro_batch,
                    seed_micro_batch=lambda index: place.__setitem__(0, index),
                )  # fmt: skip

            loss = retry_smaller(attempt, lambda error: False) if techniques.recovery else attempt()
        assert torch.isfinite(loss)
        if masks:
            apply_masks(prunable(model), masks)
            zeros = sum(int((weight == 0).sum()) for weight in prunable(model).values())
            assert zeros == sum(weight.numel() for weight in prunable(model).values()) // 2
    assert all(parameter.grad is None for parameter in model.parameters())
    return {name: parameter.detach().double() for name, parameter in model.named_parameters()}


def task_and_batch(model, step):
    if isinstance(model, Seq2SeqModel):
        return PairTask(model), packed_batch(seed=step, targets=70)
    return PlainLoss(model), unequal_batch(seed=step)


class PairTask(PlainTask):
    """Sequence to sequence."""

    def loss_sum(self, batch):
        return self.module.loss_sum(batch.inputs, batch.decoder_inputs, batch.targets, 0.1)


class PlainLoss(PlainTask):
    """The model's own loss, which the chunked head is part of."""

    def loss_sum(self, batch):
        return self.module.loss_sum(batch.inputs, batch.target_index, batch.targets)


@pytest.fixture(autouse=True)
def everything_is_stored(monkeypatch):
    monkeypatch.setattr("leanbert.memory.offload.SMALLEST_BYTES", 1)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return train((), tmp_path_factory.mktemp("plain"))


PAIRS = [
    pair
    for pair in itertools.combinations(ROWS, 2)
    if frozenset(pair) not in REFUSED and not any(set(pair) <= group for group in SAME_SETTING)
]


@pytest.mark.parametrize("names", [(name,) for name in ROWS] + PAIRS, ids="+".join)
def test_trains_as_plain_training_does(names, plain, tmp_path):
    check(train(names, tmp_path), plain, names)


@pytest.mark.parametrize("name", [name for name in ROWS if ROWS[name].moves == 1e-6])
def test_exact_techniques_are_exact_with_rounded_weights_too(name, tmp_path):
    check(train((name, "rounding"), tmp_path), train(("rounding",), tmp_path), (name,))


@pytest.fixture(scope="module", params=["encoder", "shared", "targets"])
def pairs_and_plain(request, tmp_path_factory):
    """Makes a model of sequence to sequence; and what plain training makes of it."""
    settings = {"targets": {"targets": 70}}.get(request.param, {"start": request.param})

    def make():
        return tiny_seq2seq(preset="bert", **settings)

    return make, train((), tmp_path_factory.mktemp("plain"), make)


@pytest.mark.parametrize("name", ROWS)
def test_alone_it_trains_an_encoder_with_decoder_as_plain_training_does(name, pairs_and_plain, tmp_path):
    make, plain = pairs_and_plain
    check(train((name,), tmp_path, make), plain, (name,))


def check(moved, plain, names):
    """Compare parameters with those of plain training."""
    allowed = sum(ROWS[name].moves for name in names)
    for name, value in moved.items():
        if allowed < 1:
            assert (value - plain[name]).abs().max().item() <= allowed, name
    if max(ROWS[name].moves for name in names) > 1e-6:
        assert any(
            value.shape != plain[name].shape or not torch.equal(value, plain[name]) for name, value in moved.items()
        )


@pytest.mark.parametrize("names", sorted(tuple(sorted(pair)) for pair in REFUSED), ids="+".join)
def test_is_refused_with_the_reason_and_the_fix(names, tmp_path):
    with pytest.raises(UserError, match=r"^\w+(\.\w+)?: .* (Use|Leave|Set) "):
        train(names, tmp_path)
