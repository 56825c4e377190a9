import pytest
import torch

from leanbert.compression import pruning
from leanbert.compression.pruning import (
    PATTERNS,
    SCOPES,
    add_movement,
    apply_masks,
    block_scores,
    cubic_sparsity,
    magnitude_masks,
    make_masks,
    masks_of_zeros,
    n_of_m_masks,
    prunable,
    sparsity_of,
    tiled,
)
from tests.tiny import tiny_model


def random_weights(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (7, 11), "b": (30, 5), "c": (1, 3)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def dropped(masks):
    return {name: int((~mask).sum()) for name, mask in masks.items()}


def test_the_schedule_is_cubic():
    assert [cubic_sparsity(step, 10, 20, 0.8) for step in (0, 10, 20, 99)] == [0.0, 0.0, 0.8, 0.8]
    assert cubic_sparsity(15, 10, 20, 0.8) == pytest.approx(0.8 * 7 / 8)
    assert cubic_sparsity(12, 10, 20, 0.8) == pytest.approx(0.8 * (1 - 0.8**3))
    assert cubic_sparsity(5, 5, 5, 0.5) == 0.5  # all at once


@pytest.mark.parametrize("preset", ["bert", "modern"])
def test_only_linear_matrices_are_prunable(preset):
    model = tiny_model(preset=preset)
    weights = prunable(model)
    layers = ("attention.qkv", "attention.output", "feed_forward.input", "feed_forward.output")
    expected = {f"encoder.blocks.{block}.{layer}.weight" for block in range(2) for layer in layers}
    assert set(weights) == expected | {"head.dense.weight"}
    embeddings = {"bert": ("token", "segment", "position"), "modern": ("token",)}[preset]
    more = {f"encoder.embeddings.{name}.weight" for name in embeddings}
    assert set(prunable(model, include_embeddings=True)) == set(weights) | more
    assert all(weights[name] is model.get_parameter(name) for name in weights)


def test_a_shared_matrix_is_found_once():
    first, second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    second.weight = first.weight
    assert list(prunable(torch.nn.Sequential(first, second))) == ["0.weight"]


@pytest.mark.parametrize("slice_size", [8, 2**22])
@pytest.mark.parametrize("sparsity", [0.0, 0.001, 0.3, 0.5, 0.97])
def test_global_masks_drop_exactly_the_smallest(monkeypatch, slice_size, sparsity):
    monkeypatch.setattr(pruning, "SLICE", slice_size)
    weights = random_weights()
    masks = magnitude_masks(weights, sparsity)
    kept = torch.cat([weights[name][mask].abs() for name, mask in masks.items()])
    gone = torch.cat([weights[name][~mask].abs() for name, mask in masks.items()])
    assert len(gone) == round(sparsity * 230)
    assert not len(gone) or gone.max() < kept.min()
    assert all(mask.dtype == torch.bool and mask.nbytes == weights[name].numel() for name, mask in masks.items())


def test_layer_masks_drop_the_same_share_of_each():
    masks = magnitude_masks(random_weights(), 0.4, "layer")
    assert dropped(masks) == {"a": round(0.4 * 77), "b": 60, "c": 1}
    assert dropped(magnitude_masks(random_weights(), 0.4)) != dropped(masks)


@pytest.mark.parametrize("slice_size", [4, 2**22])
def test_equal_magnitudes_go_in_order_and_counts_stay_exact(monkeypatch, slice_size):
    monkeypatch.setattr(pruning, "SLICE", slice_size)
    weights = {"a": torch.tensor([[2.0, -1.0, 1.0, 0.0, 1.0, -1.0]]), "b": torch.tensor([[1.0, 0.5]])}
    masks = magnitude_masks(weights, 0.5)
    assert masks["a"].tolist() == [[True, False, False, False, True, True]]
    assert masks["b"].tolist() == [[True, False]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_counts_are_exact_in_every_dtype(dtype):
    """8 bits of mantissa make many equal magnitudes."""
    weights = random_weights(dtype)
    masks = magnitude_masks(weights, 0.5)
    assert sum(dropped(masks).values()) == 115
    apply_masks(weights, masks)
    assert sparsity_of(weights) == 0.5


def test_what_is_zero_stays_among_the_pruned_as_sparsity_grows():
    weights = random_weights()
    first = magnitude_masks(weights, 0.3)
    apply_masks(weights, first)
    second = magnitude_masks(weights, 0.6)
    assert all((second[name] <= first[name]).all() for name in weights)
    assert sum(dropped(second).values()) == 138


def test_masks_come_back_from_the_zeros():
    weights = random_weights()
    masks = magnitude_masks(weights, 0.5)
    apply_masks(weights, masks)
    assert all(torch.equal(mask, masks[name]) for name, mask in masks_of_zeros(weights).items())


def test_applying_masks_leaves_the_others_alone():
    weights, before = random_weights(), random_weights()
    masks = magnitude_masks(weights, 0.5)
    apply_masks({name: torch.nn.Parameter(weight) for name, weight in weights.items()}, masks)
    for name, mask in masks.items():
        assert torch.equal(weights[name][mask], before[name][mask])
        assert (weights[name][~mask] == 0).all()


@pytest.mark.parametrize("slice_size", [8, 2**22])
@pytest.mark.parametrize("sparsity", [0.001, 0.3, 0.5, 0.97])
def test_signed_scores_are_ordered_as_numbers_and_what_is_gone_comes_first(monkeypatch, slice_size, sparsity):
    monkeypatch.setattr(pruning, "SLICE", slice_size)
    scores = random_weights()
    scores["a"][2] = -torch.inf  # 11 of 230
    masks = magnitude_masks(scores, sparsity, signed=True)
    kept = torch.cat([scores[name][mask] for name, mask in masks.items()])
    gone = torch.cat([scores[name][~mask] for name, mask in masks.items()])
    assert len(gone) == round(sparsity * 230)
    assert not len(gone) or gone.max() <= kept.min()
    assert int((gone == -torch.inf).sum()) == min(len(gone), 11)


def test_two_of_four_and_four_of_eight():
    weight = torch.tensor([[1.0, -4.0, 3.0, 2.0, 0.0, 0.0, 0.0, 0.0], [5.0, 5.0, 5.0, 5.0, -9.0, 1.0, 1.0, 2.0]])
    assert n_of_m_masks(weight, 2, 4).int().tolist() == [[0, 1, 1, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 0, 0, 1]]
    assert n_of_m_masks(weight, 4, 8).int().tolist() == [[1, 1, 1, 1, 0, 0, 0, 0], [0, 1, 1, 1, 1, 0, 0, 0]]
    signed = n_of_m_masks(weight, 2, 4, signed=True).int().tolist()
    assert signed == [[0, 0, 1, 1, 0, 0, 1, 1], [0, 0, 1, 1, 0, 0, 1, 1]]
    with pytest.raises(ValueError, match=r"4:8 sparsity needs inputs in groups of 8, the weight has 12"):
        n_of_m_masks(torch.ones(4, 12), 4, 8)
    assert ("global", "layer", *PATTERNS) == SCOPES
    for scope, (kept, of) in PATTERNS.items():
        assert scope == f"{kept}:{of}"
        assert torch.equal(make_masks({"": weight}, 0.5, scope)[""], n_of_m_masks(weight, kept, of))


BLOCKS = torch.tensor([[3.0, 0.0, -1.0, 1.0], [0.0, -4.0, 1.0, -1.0], [0.0, 0.0, 6.0, 0.0], [0.0, 0.0, 0.0, -6.5]])


def test_a_block_is_worth_its_norm_or_the_sum_of_its_scores():
    assert block_scores(BLOCKS, 2).tolist() == [[5.0, 2.0], [0.0, pytest.approx((36 + 6.5**2) ** 0.5)]]
    assert block_scores(BLOCKS, 2, signed=True).tolist() == [[-1.0, 0.0], [0.0, -0.5]]
    assert block_scores(BLOCKS.bfloat16(), 2).dtype == torch.float32


@pytest.mark.parametrize(("signed", "gone"), [(False, {(0, 1), (1, 0)}), (True, {(0, 0), (1, 1)})])
def test_blocks_leave_whole(signed, gone):
    mask = make_masks({"": BLOCKS}, 0.5, "global", 2, signed=signed)[""]
    found = (~mask).unflatten(0, (2, 2)).unflatten(2, (2, 2)).sum((1, 3))
    assert found.tolist() == [[4 * ((row, column) in gone) for column in (0, 1)] for row in (0, 1)]


def test_blocks_of_all_matrices_or_of_each():
    weights = {"large": torch.full((4, 4), 2.0), "small": torch.full((4, 8), 1.0)}
    assert dropped(make_masks(weights, 0.5, "global", 2)) == {"large": 0, "small": 24}
    assert dropped(make_masks(weights, 0.5, "layer", 2)) == {"large": 8, "small": 16}


def test_only_matrices_of_whole_groups_are_taken(capsys):
    weights = {
        name: torch.nn.Parameter(torch.ones(shape)) for name, shape in (("a", (4, 8)), ("b", (8, 4)), ("c", (4, 6)))
    }
    assert list(tiled(weights, "global")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""
    assert list(tiled(weights, "2:4")) == ["a", "b"]
    assert list(tiled(weights, "4:8")) == ["a"]
    assert "pruning leaves 2 matrices dense that are no multiple of 1 x 8: b, ..." in capsys.readouterr().err
    assert list(tiled(weights, "layer", 4)) == ["a", "b"]
    assert list(tiled(weights, "layer", 8)) == []


@pytest.mark.parametrize("slice_size", [2, 2**22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_movement_adds_up_in_float32(monkeypatch, slice_size, dtype):
    """1.0078125 squared has more digits than bfloat16 keeps."""
    monkeypatch.setattr(pruning, "SLICE", slice_size)
    weight = torch.nn.Parameter(torch.tensor([[1.0078125, -2.0, 0.0], [3.0, 0.5, -1.0]], dtype=dtype))
    weight.grad = torch.tensor([[1.0078125, -1.0, 7.0], [-2.0, 0.0, -0.5]], dtype=dtype)
    scores = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    scores["a"][0, 2] = -torch.inf
    weights = {"a": weight, "b": torch.nn.Parameter(torch.ones(1))}  # without a gradient
    for _ in range(2):
        add_movement(scores, weights)
    square = 1.0078125**2
    assert scores["a"].tolist() == [[-2 * square, -4.0, -torch.inf], [12.0, 0.0, -1.0]]
    assert scores["b"].tolist() == [1.0]
