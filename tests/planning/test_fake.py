from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from leanbert.planning import search as candidates
from leanbert.planning.device import Target
from leanbert.planning.dry_run import dry_run
from leanbert.planning.fake import Fake
from leanbert.planning.search import search
from leanbert.slices import parts
from tests.planning.test_predict import settings

aten = torch.ops.aten
CALLS = {
    "sum": lambda x: aten.add.Tensor(x, x),
    "another number": lambda x: aten.add.Tensor(x, 1.0),
    "another type": lambda x: aten.gt.Scalar(x, 1),
    "a whole number": lambda x: aten.full_like.default(x, 1, dtype=torch.int64),
    "view": lambda x: aten.view.default(x, [12, 2]),
    "unsafe view": lambda x: aten._unsafe_view.default(x, [2, 12]),
    "view of a view": lambda x: aten.t.default(aten.slice.Tensor(x, 0, 1, 3)),
    "views": lambda x: aten.split.Tensor(x, 3),
    "list": lambda x: aten.cat.default([x, x]),
    "several": lambda x: aten.native_layer_norm.default(x, [6], None, None, 1e-5),
    "copy": lambda x: aten.clone.default(aten.t.default(x), memory_format=torch.contiguous_format),
    "without arguments": lambda x: aten.zeros.default([2, 3], device=torch.device("cpu")),
    "16 bits": lambda x: aten.mm.default(x.to(torch.bfloat16), x.t().to(torch.bfloat16)),
}

with FakeTensorMode():
    ELSEWHERE = torch.empty(4)


def through(mode, slices, inner=(), alike=False):
    """Go through a shortened loop whose body counts one operation, or those of an inner loop."""
    seen = []
    for part in mode.shorten(slices, alike):
        seen.append((part.start, part.stop))
        if inner:
            through(mode, inner)
        else:
            mode.flops["forward"] += part.stop - part.start
    return seen


def test_the_second_slice_stands_for_all_of_its_length_operations_included():
    mode = Fake()
    mode.flops = Counter(forward=100)
    assert through(mode, parts(20, 4)) == [(0, 4), (4, 8)]
    assert mode.flops["forward"] == 120
    assert through(mode, parts(19, 4)) == [(0, 4), (4, 8), (16, 19)]
    assert mode.flops["forward"] == 139
    assert through(mode, parts(3, 4)) == [(0, 3)]
    assert through(mode, []) == []
    assert through(mode, parts(19, 4), alike=True) == [(0, 4), (16, 19)]
    assert mode.flops["forward"] == 142 + 19
    mode.flops["forward"] -= 19
    through(mode, parts(5, 1), inner=parts(7, 1))
    assert mode.flops["forward"] == 142 + 5 * 7


def looks(result, given):
    """What torch says of tensors, and whether they are on the storage of what was given."""
    return [
        (
            type(one), one.dtype, one.device, one.shape, one.stride(), one.storage_offset(), one.requires_grad,
            one.untyped_storage().nbytes(), one.untyped_storage()._cdata == given.untyped_storage()._cdata,
        )
        for one in (result if isinstance(result, list | tuple) else [result])
    ]  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_what_is_made_again_is_what_torch_makes(name, monkeypatch):
    monkeypatch.setattr(Fake, "known", {})
    with FakeTensorMode():
        given = torch.empty(4, 6)
        expected = looks(CALLS[name](given), given)
    for _ in range(2):
        with Fake():
            given = torch.empty(4, 6)
            assert looks(CALLS[name](given), given) == expected
            known = len(Fake.known)
            assert looks(CALLS[name](given), given) == expected
    assert known == len(Fake.known) > 1  # that of the tensor that is given, and of the call


def test_what_depends_on_more_than_shapes_is_left_to_torch():
    with Fake() as mode:
        given, constant = torch.empty(4), torch.tensor(2.0)
        others = {
            "a value": (aten.add.Tensor, (constant, constant)),
            "a tensor of another mode": (aten.add.Tensor, (given, ELSEWHERE)),
            "arguments that change": (aten.add_.Tensor, (given, given)),
            "a generator": (aten.bernoulli.default, (given, torch.Generator())),
        }
        assert [name for name, (func, args) in others.items() if mode._key(func, args, {}) is not None] == []
        assert (constant + constant).constant == 4
        assert mode._key(aten.add.Tensor, (given, given), {}) is not None


def test_numbers_of_another_type_are_others():
    with Fake() as mode:
        counts = torch.empty(3, dtype=torch.int64)
        assert mode._key(aten.add.Tensor, (counts, 1), {}) != mode._key(aten.add.Tensor, (counts, 1.0), {})
        assert (counts + 1).dtype == (counts + 2).dtype == torch.int64
        assert (counts + 1.0).dtype == (counts + 2.0).dtype == torch.float32


@pytest.fixture
def by_torch_alone(monkeypatch):
    """Have torch work out each result, as if none was known."""

    def switch():
        monkeypatch.setattr(Fake, "_key", lambda self, func, args, kwargs: None)

    return switch


def events(run):
    """All that was made and freed in a dry run, in its order."""
    return [
        [
            (e.operation, e.phase, e.delta_bytes, e.storage and (e.storage.category, e.storage.shape))
            for e in line.events
        ]
        for line in (run.step, run.validation)
    ]


@pytest.mark.parametrize(
    "names", [(), ("accumulation", "checkpointing", "bf16_mixed"), ("lean",), ("optimizer_in_backward", "adafactor")]
)
def test_every_event_of_a_dry_run_is_that_of_torch_alone(names, by_torch_alone):
    run = settings(*names, optimizer="muon", encoder={"num_layers": 3}, micro_batch=4)
    found = dry_run(run, 16)
    by_torch_alone()
    assert events(found) == events(expected := dry_run(run, 16))
    assert (found.flops, found.update_flops) == (expected.flops, expected.update_flops)


def test_a_plan_is_that_of_torch_alone(monkeypatch, by_torch_alone):
    rungs = [(), ("chunked_head",), ("return_pages", "accumulation"), ("return_pages", "checkpointing", "adamw_8bit")]
    monkeypatch.setattr(candidates, "ladder", lambda run, target: rungs)
    run, target = settings(rows=8, optimizer="muon"), Target("cpu", 1_000_000, slack=0.25, slack_returned=0.05)
    budget = round(search(run, target, None).given.needs_bytes * 0.6)
    plan = search(run, target, budget)
    assert plan.chosen is not None
    by_torch_alone()
    assert search(run, target, budget) == plan
