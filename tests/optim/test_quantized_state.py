import pytest
import torch

from leanbert.memory.step import seed_position
from leanbert.optim.adamw import CODES
from leanbert.optim.quantized_state import draw_int16, mix_position, write_bfloat16

CPU = torch.device("cpu")


def round_trip(code, values, draws):
    codes, scales = code.zeros(values.numel(), CPU)
    code.encode(values.clone(), draws, codes, scales)
    return code.decode(codes, scales, values.dtype)


def samples(code, blocks=64):
    values = torch.randn(blocks, code.block, generator=torch.Generator().manual_seed(0))
    return values if code.signed else values.square()


def all_levels(code):
    """Each level once or more in every block."""
    least = -code.levels if code.signed else 1
    level = (torch.arange(code.block) % (code.levels - least + 1) + least).float()
    values = (level.abs() / code.levels).pow(2**code.squarings).copysign(level)
    return values * torch.tensor([[1.0], [3.0], [1e-9]])


each_code = pytest.mark.parametrize("code", CODES.values(), ids=lambda code: f"{code.bits}-{code.signed}")


@each_code
def test_levels_are_kept_whatever_is_drawn(code):
    values = all_levels(code)
    for position in range(3):
        kept = round_trip(code, values, draw_int16(values.numel(), CPU, position).view_as(values))
        torch.testing.assert_close(kept, values, rtol=3e-4, atol=0)


@each_code
def test_a_value_becomes_one_of_its_neighbours_with_its_own_expected_value(code):
    values = samples(code)
    rounds = [round_trip(code, values, draw_int16(values.numel(), CPU, n).view_as(values)) for n in range(300)]
    drawn = torch.stack(rounds)
    assert max(len(drawn[:, 0, n].unique()) for n in range(code.block)) == 2
    inside = values > values.amax(1, keepdim=True) / code.levels ** (2**code.squarings)
    kept = torch.ones_like(inside) if code.signed else inside
    small = values.abs() < 0.05 * values.abs().amax(1, keepdim=True)
    for chosen in (kept & small, kept & ~small):
        error = ((drawn.mean(0) - values) * values.sign())[chosen].double().sum()
        standard_error = (drawn.var(0)[chosen].double().sum() / len(drawn)).sqrt()
        assert abs(float(error / standard_error)) < 4
        assert float(standard_error) > 0


@each_code
def test_draws_of_zero_round_to_nearest(code):
    values = samples(code)
    kept = round_trip(code, values, torch.zeros_like(values, dtype=torch.int16))
    worst = float(((kept - values).abs() / values.abs().amax(1, keepdim=True)).max())
    widest = 1 - (1 - 1 / code.levels) ** (2**code.squarings)  # of the steps from one level to the next
    assert 0.25 * widest < worst <= 0.501 * widest


def test_zero_blocks_stay_zero_and_their_second_moment_far_below_eps():
    for (bits, name), code in CODES.items():
        values = torch.zeros(2, code.block)
        kept = round_trip(code, values, draw_int16(values.numel(), CPU, 1).view_as(values))
        assert torch.isfinite(kept).all()
        assert float(kept.abs().max()) == 0.0 or (name == "exp_avg_sq" and float(kept.sqrt().max()) < 1e-14), bits


def test_second_moments_have_no_zero():
    for bits, least in ((8, 256.0**-4), (4, 16.0**-4)):
        code = CODES[bits, "exp_avg_sq"]
        values = torch.zeros(1, code.block)
        values[0, 0] = 2.0
        kept = round_trip(code, values, torch.zeros_like(values, dtype=torch.int16))
        torch.testing.assert_close(kept[0, 1:], torch.full((code.block - 1,), 2 * least))


def test_nan_and_infinity_are_not_hidden():
    for code in CODES.values():
        for bad in (float("nan"), float("inf")):
            values = torch.ones(1, code.block)
            values[0, 3] = bad
            assert not torch.isfinite(round_trip(code, values, torch.zeros_like(values, dtype=torch.int16))).any()


def test_four_bits_hold_two_codes_a_byte():
    code = CODES[4, "exp_avg_sq"]
    codes, scales = code.zeros(300, CPU)
    assert (codes.shape, codes.dtype, scales.shape, scales.dtype) == ((3, 64), torch.uint8, (3, 1), torch.float32)
    values = torch.zeros(3, 128)
    values[:, 0], values[:, 64] = 1.0, 1.0  # the first byte's low and high half
    code.encode(values, torch.zeros(3, 128, dtype=torch.int16), codes, scales)
    assert codes[:, 0].tolist() == [255] * 3
    assert not codes[:, 1:].any()


def test_a_fresh_code_holds_zeros():
    for code in CODES.values():
        assert not code.decode(*code.zeros(1000, CPU), torch.float32).any()


def test_bfloat16_is_rounded_without_bias():
    exact = torch.tensor([1.0, -1.0, 3.140625, 0.0, -0.0])
    between = torch.tensor([1.0 + 2**-9, -1.0 - 2**-9, 1.0 + 2**-7 / 64, -1e-20])
    target = torch.empty(5, dtype=torch.bfloat16)
    for n in range(20):
        write_bfloat16(exact.clone(), draw_int16(5, CPU, n), target)
        assert torch.equal(target.float(), exact)
    many = between.repeat_interleave(100_000)
    target = torch.empty(many.shape, dtype=torch.bfloat16)
    write_bfloat16(many.clone(), draw_int16(many.numel(), CPU, 0), target)
    share = (target.view(4, -1).float().abs() > between[:, None].abs()).double().mean(1)
    assert share[:3].tolist() == pytest.approx([0.25, 0.25, 1 / 64], abs=0.006)
    means = target.view(4, -1).double().mean(1)
    assert means.tolist() == pytest.approx(between.tolist(), rel=1e-4)


def test_bfloat16_keeps_nan_of_every_device_and_infinity():
    patterns = torch.tensor([0x7FFFFFFF, 0x7FC00000, -0x400000, 0x7F800000, -0x800000], dtype=torch.int32)
    for draw in (-(2**15), 2**15 - 1):
        target = torch.empty(5, dtype=torch.bfloat16)
        write_bfloat16(patterns.clone().view(torch.float32), torch.full((5,), draw, dtype=torch.int16), target)
        assert torch.isnan(target[:3]).all()
        assert target[3:].tolist() == [float("inf"), -float("inf")]


def test_draws_are_a_function_of_position_and_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    first = draw_int16(1001, CPU, 3, 4)
    assert torch.equal(first, draw_int16(1001, CPU, 3, 4))
    assert (first == draw_int16(1001, CPU, 4, 3)).float().mean() < 0.01
    assert torch.equal(torch.get_rng_state(), state)
    assert (first.dtype, first.shape) == (torch.int16, (1001,))
    many = draw_int16(2**18, CPU, 0).double()
    assert float(many.mean()) == pytest.approx(-0.5, abs=150)  # standard error 37
    assert float(many.std()) == pytest.approx(2**16 / 12**0.5, rel=0.01)


def test_positions_are_mixed_as_the_step_mixes_them():
    seed_position(5, 7)
    expected = torch.rand(3)
    torch.manual_seed(mix_position(5, 7))
    assert torch.equal(torch.rand(3), expected)
