from dataclasses import replace

import pytest

from leanbert.memory import allocator
from leanbert.planning import search as candidates
from leanbert.planning.device import Target
from leanbert.planning.overlays import apply, read
from leanbert.planning.predict import predict
from leanbert.planning.search import ENOUGH, ladder, largest_that_fits, micro_batches, search
from leanbert.tasks.techniques import listed
from tests.planning.test_predict import settings

CPU = Target("cpu", 1_000_000, slack=0.25, slack_returned=0.05)
SIZES = range(1, 2**16 + 1)


def test_micro_batches_are_halves():
    assert micro_batches(32) == [1, 2, 4, 8, 16]
    assert micro_batches(13) == [1, 2, 4, 7]
    assert micro_batches(1) == []


@pytest.mark.parametrize(
    "needs",
    [
        lambda rows: 1000 + 37 * rows,
        lambda rows: max(40_000, 1000 + 37 * rows),  # below, the optimizer's state is the peak
        lambda rows: 1000 + 37 * rows + 400 * (rows // 64),
        lambda rows: 1000 + 90 * min(rows, 300) + 37 * rows,
    ],
)
def test_the_largest_micro_batch_is_found_in_a_few_dry_runs(needs):
    tried = []
    for budget in (50_000, 123_456, 1_000_000, 40_000):
        tried.clear()
        rows = largest_that_fits(SIZES, lambda rows: tried.append(rows) or needs(rows), budget)
        assert needs(rows) <= budget < needs(rows + 1)
        assert len(tried) <= ENOUGH + 16  # then the range is halved
    largest_that_fits(SIZES, lambda rows: tried.append(rows) or 1000 + 37 * rows, 123_456)
    assert tried[-4:] == [1, 2**16, 3309, 3310]
    assert largest_that_fits(SIZES, needs, 1000) is None
    assert largest_that_fits(SIZES, needs, 10**9) == 2**16


@pytest.mark.parametrize("most", [1, 2, 4, 8, 16])
def test_of_halves_the_largest_that_fits_is_found_in_at_most_four(most):
    tried = []
    needs = lambda rows: tried.append(rows) or 1000 + 37 * rows  # noqa: E731
    assert largest_that_fits(micro_batches(32), needs, 1000 + 37 * most + 36) == most
    assert len(tried) <= 4
    assert len(set(tried)) == len(tried)
    assert largest_that_fits([1], needs, 1037) == 1


@pytest.fixture
def products(monkeypatch):
    """Let this processor have 16-bit matrix products, or none."""

    def have(answer: bool) -> None:
        monkeypatch.setattr(listed, "has_16_bit_products", lambda device_type: answer)

    have(True)
    return have


def test_the_ladder_begins_with_what_is_free_and_ends_with_what_changes_the_model(products):
    sets = ladder(settings(), CPU)
    assert sets[:2] == [(), ("chunked_head",)]
    assert sets[-1][-2:] == ("offload", "structured_pruning")
    first = {name: next(i for i, names in enumerate(sets) if name in names) for names in sets for name in names}
    order = ["accumulation", "bf16_mixed", "selective_checkpointing", "checkpointing", "optimizer_in_backward",
             "adamw_8bit", "adamw_4bit", "bf16_true", "offload", "structured_pruning"]  # fmt: skip
    assert sorted(order, key=first.__getitem__) == order


def test_without_16_bit_products_16_bits_come_after_the_disk(products):
    products(False)
    sets = ladder(settings(), CPU)
    assert not any("bf16_mixed" in names for names in sets)
    assert ["bf16_true" in names for names in sets] == [False] * (len(sets) - 2) + [True, True]
    assert "offload" in sets[-3]
    assert "structured_pruning" in sets[-1]
    assert any("bf16_mixed" in names for names in ladder(settings(), Target("cuda", 0, 0.1, 0.1)))


def test_what_is_there_already_is_not_added(products):
    assert not any("bf16_mixed" in names for names in ladder(settings(precision="bf16-mixed"), CPU))
    assert not any("adamw_8bit" in names for names in ladder(settings(optimizer="sgd"), CPU))
    gpu = ladder(settings(), Target("cuda", 0, 0.1, 0.1))
    assert any("offload_host" in names for names in gpu)
    assert not any("return_pages" in names or "offload" in names for names in gpu)


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        ({"clip": 1.0}, {"optimizer_in_backward"}),
        ({"devices": 4, "strategy": "ddp"}, {"optimizer_in_backward"}),
        ({"devices": 4, "strategy": "fsdp2"}, {"optimizer_in_backward", "layer_major"}),
    ],
)
def test_what_is_refused_is_left_out_and_what_costs_more_is_tried(products, given, refused):
    """Norms are of all gradients, ddp keeps them, and shards are gathered block by block."""
    plain, sets = ladder(settings(), CPU), ladder(replace(settings(), **given), CPU)
    assert {name for names in plain for name in names} - {name for names in sets for name in names} == refused
    assert sets[-1][-4:] == ("adamw_4bit", "bf16_true", "offload", "structured_pruning")
    assert ("checkpointing" in sets[-1]) == ("layer_major" in refused)


def test_of_several_devices_each_rung_is_tried_whole_and_on_shards(products):
    sets = ladder(replace(settings(), devices=4), CPU)
    assert [names for names in sets if "fsdp" not in names] == ladder(
        replace(settings(), devices=4, strategy="ddp"), CPU
    )
    sharded = ladder(replace(settings(), devices=4, strategy="fsdp2"), CPU)
    assert [names for names in sets if "fsdp" in names] == [("fsdp", *names) for names in sharded]
    assert sets.index(("fsdp",)) == 1


def test_shards_get_few_bits_where_a_budget_needs_them(products):
    """With 4 devices a quarter of the state: 8 bits are 6 bytes a parameter less in 16, of the given a quarter."""
    run = replace(settings(optimizer="adamw"), devices=4, strategy="fsdp2")
    every = search(run, CPU, None).candidates
    eight = next(each for each in every if "adamw_8bit" in each.techniques)
    chosen = search(run, CPU, eight.needs_bytes).chosen
    assert chosen is not None
    assert "adamw_8bit" in chosen.techniques


def test_without_glibc_no_pages_are_returned(products, monkeypatch):
    monkeypatch.setattr(listed, "can_be_asked", lambda: False)
    sets = ladder(settings(), CPU)
    assert len(sets) > 8
    assert not any("return_pages" in names for names in sets)


def short(run, target):
    """A few rungs of the ladder: what is searched, without the time of all."""
    return [(), ("chunked_head",), ("return_pages", "accumulation"), ("return_pages", "layer_major")]


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(candidates, "ladder", short)


@pytest.mark.slow
@pytest.mark.usefixtures("few")
def test_the_cheapest_that_fits_has_the_largest_micro_batch_that_fits():
    run = settings(rows=32)
    given = search(run, CPU, None).given
    budget = CPU.base_bytes + round(0.35 * (given.needs_bytes - CPU.base_bytes))
    plan = search(run, CPU, budget)
    assert plan.chosen is not None
    assert plan.chosen.techniques == ("return_pages", "accumulation")
    assert plan.chosen.needs_bytes <= budget
    assert 1 < plan.chosen.micro_batch < 16
    larger = apply(run, read("accumulation", 2 * plan.chosen.micro_batch))
    assert round(predict(larger).peak_bytes * 1.05) + CPU.base_bytes > budget
    changed = apply(run, plan.chosen.overlay)
    assert plan.chosen.prediction.peak_bytes == predict(changed).peak_bytes
    assert changed.data.hparams["batch_size"] == 32
    assert [plan.fits(candidate) for candidate in plan.candidates] == [False, True, True]
    assert plan.candidates[2].micro_batch == plan.chosen.micro_batch
    first = search(run, CPU, budget, first=True)
    assert first.chosen == plan.chosen
    assert first.candidates == plan.candidates[:2]


@pytest.mark.usefixtures("few")
def test_a_search_asks_the_c_library_nothing(monkeypatch):
    """It would stay so for the whole process, in which steps may be timed next."""
    asked = []
    monkeypatch.setattr(allocator, "_ask", asked.append)
    plan = search(settings(), CPU, None)
    assert any("return_pages" in candidate.techniques for candidate in plan.candidates)
    assert asked == []


@pytest.mark.usefixtures("few")
def test_the_given_configuration_is_chosen_if_it_fits_and_nothing_if_none_does():
    run = settings(rows=4)
    assert search(run, CPU, 10**12).chosen.techniques == ()
    plan = search(run, CPU, 1000)
    assert plan.chosen is None
    needs = [candidate.needs_bytes for candidate in plan.candidates]
    assert needs == sorted(needs, reverse=True)  # what saves nothing is left out


@pytest.mark.usefixtures("few")
def test_a_given_micro_batch_gives_way_to_a_smaller_one():
    run = settings("accumulation", rows=32, micro_batch=8)
    plan = search(run, CPU, 1000)
    assert plan.given.micro_batch == 8
    assert plan.candidates[-1].techniques == ("return_pages", "accumulation")  # and none in slices: refused
    changed = apply(run, plan.candidates[-1].overlay)
    assert [callback.schedule for callback in changed.callbacks if hasattr(callback, "schedule")] == [{0: 1}]


def test_every_rung_needs_less_than_the_one_before():
    run = settings(rows=4, encoder={"num_layers": 2, "hidden_size": 64})
    plan = search(run, CPU, 1000)
    assert plan.candidates[-1].techniques[-2:] == ("offload", "structured_pruning")
    assert len(plan.candidates) > 6


@pytest.mark.slow
def test_techniques_that_the_given_ones_exclude_are_left_out():
    plan = search(settings("layer_major", encoder={"num_layers": 3}), CPU, None)
    assert len(plan.candidates) > 2
    assert not any("accumulation" in c.techniques or "checkpointing" in c.techniques for c in plan.candidates)


def test_shards_are_chosen_before_techniques_that_cost_compute():
    run = replace(settings(rows=4), devices=2)
    whole, shards = predict(run).peak_bytes, predict(replace(run, strategy="fsdp2")).peak_bytes
    assert shards < whole
    gpu = Target("cuda", 0, 0.0, 0.0)
    chosen = search(run, gpu, (whole + shards) // 2, first=True).chosen
    assert chosen.techniques == ("fsdp",)
    assert chosen.prediction.peak_bytes == shards
    assert chosen.overlay["trainer"]["strategy"] == "fsdp"
