import io

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode

from leanbert.errors import UserError
from leanbert.optim import adamw
from leanbert.optim.adamw import MOMENTS, SLICE_ELEMENTS, SlicedAdamW, decode_moment
from leanbert.optim.build import OptimizerConfig, build_optimizer

MIB = 2**20
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.1}

each_width = pytest.mark.parametrize("bits", [32, 8, 4])


def parameters(dtype=torch.float32, shapes=((70, 90), (7,), (3, 5)), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_gradients(weights, step):
    generator = torch.Generator().manual_seed(1000 + step)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)


def train(optimizer, weights, steps):
    for step in steps:
        set_gradients(weights, step)
        optimizer.step()


def saved_and_loaded(optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_32_bits_equal_torch(monkeypatch, dtype, rtol):
    monkeypatch.setattr(adamw, "SLICE_ELEMENTS", 1024)  # the largest parameter takes 7 slices
    ours, theirs = parameters(dtype), parameters(dtype)
    train(SlicedAdamW(ours, **SETTINGS), ours, range(20))
    train(torch.optim.AdamW(theirs, **SETTINGS), theirs, range(20))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=rtol, atol=rtol)


def test_fp64_parameters_have_fp64_state():
    weights = parameters(torch.float64)
    optimizer = SlicedAdamW(weights)
    train(optimizer, weights, range(1))
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {torch.float64}


@each_width
def test_bytes_of_state(bits):
    with FakeTensorMode():
        weights = torch.nn.Parameter(torch.empty(3272, 1024, dtype=torch.bfloat16))  # BERT-large has 335 million
        weights.grad = torch.empty_like(weights)
        optimizer = SlicedAdamW([weights], state_bits=bits)
        optimizer.step()
        held = [value for value in optimizer.state[weights].values() if isinstance(value, torch.Tensor)]
        state_bytes = sum(tensor.numel() * tensor.element_size() for tensor in held)
    elements = 3272 * 1024
    assert (
        state_bytes
        == {32: 8 * elements, 8: 2 * elements + 8 * elements // 256, 4: elements + 8 * elements // 128}[bits]
    )
    assert state_bytes * 335e6 / elements <= {32: 2560 * MIB, 8: 650 * MIB, 4: 345 * MIB}[bits]


def test_small_parameters_keep_full_state():
    weights = parameters(torch.bfloat16, shapes=((64, 64), (4095,)))
    optimizer = SlicedAdamW(weights, state_bits=8)
    train(optimizer, weights, range(1))
    assert optimizer.state[weights[0]]["exp_avg_codes"].dtype == torch.uint8
    assert optimizer.state[weights[1]]["exp_avg"].dtype == torch.float32


class LiveBytes(TorchDispatchMode):
    """The peak of bytes of storages that appear while it is active."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = (torch.multiprocessing.reductions.StorageWeakRef(storage), storage.nbytes())
        self.live = {key: (ref, size) for key, (ref, size) in self.live.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out


@each_width
def test_transients_do_not_grow_with_the_parameter(bits):
    weights = torch.nn.Parameter(torch.zeros(64 * MIB // 2, dtype=torch.bfloat16))  # 32 slices
    weights.grad = torch.ones_like(weights)
    optimizer = SlicedAdamW([weights], state_bits=bits)
    optimizer._begin(weights, bits)
    known = [weights, weights.grad, *(v for v in optimizer.state[weights].values() if isinstance(v, torch.Tensor))]
    with LiveBytes() as measured:
        optimizer.step()
    transient_bytes = measured.peak - sum(tensor.untyped_storage().nbytes() for tensor in known)
    assert SLICE_ELEMENTS * 4 < transient_bytes < SLICE_ELEMENTS * 4 * 7  # fp32 slices; the parameter has 64 MiB


def test_small_updates_of_bfloat16_add_up():
    weights = torch.nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
    optimizer = SlicedAdamW([weights], lr=1e-4, weight_decay=0.0)
    for _ in range(20):
        weights.grad = torch.ones_like(weights)
        optimizer.step()  # each step of Adam under a constant gradient is lr
    assert float(weights.detach().double().mean()) == pytest.approx(1 - 20 * 1e-4, abs=1e-4)
    assert float(torch.ones((), dtype=torch.bfloat16) - 1e-4) == 1.0  # rounded to the nearest the step is lost


@pytest.mark.parametrize(("bits", "draws", "steps"), [(8, "random", 50), (4, "random", 50), (4, "nearest", 50)])
def test_a_second_moment_of_4_bits_decays_only_with_stochastic_rounding(monkeypatch, bits, draws, steps):
    if draws == "nearest":
        monkeypatch.setattr(adamw, "draw_int16", lambda n, device, *_: torch.zeros(n, dtype=torch.int16))
    weights = torch.nn.Parameter(torch.zeros(128 * 256))
    optimizer = SlicedAdamW([weights], betas=(0.9, 0.98), state_bits=bits)
    large = torch.ones_like(weights)
    large.view(-1, 128)[:, 0] = 10.0  # keeps every block's scale
    for step in range(1 + steps):
        weights.grad = large if step == 0 else large * (large > 1)
        optimizer.step()
    moment = adamw._read(optimizer.state[weights], "exp_avg_sq", slice(0, weights.numel()), torch.float32)
    moment = moment.view(-1, 128)[:, 1:].double().mean()
    exact = 0.02 * 0.98**steps
    if draws == "nearest":
        assert float(moment) > 1.5 * exact
    else:
        assert float(moment) == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulating_one_micro_batch_is_an_update(dtype):
    once, folded = parameters(dtype), parameters(dtype)
    updater, folder = (SlicedAdamW(weights, **SETTINGS) for weights in (once, folded))
    for step in range(3):
        set_gradients(once, step)
        set_gradients(folded, step)
        for mine, other in zip(once, folded, strict=True):
            updater.update(mine)
            folder.accumulate(other, first=True)
            folder.apply(other)
            assert torch.equal(mine, other)
    assert updater.state_dict()["state"][0]["step"] == folder.state_dict()["state"][0]["step"] == 3


@pytest.mark.parametrize("bits", [32, 8])
def test_micro_batches_are_folded_as_adama_says(bits):
    weights = parameters(torch.float64, shapes=((64, 80),))[0]
    start, (beta1, beta2) = weights.detach().clone(), SETTINGS["betas"]
    optimizer = SlicedAdamW([weights], **SETTINGS, state_bits=bits)
    average, average_sq = torch.zeros_like(start), torch.zeros_like(start)
    for step in (1, 2):
        average, average_sq = beta1 * average, beta2 * average_sq
        for micro_batch in range(3):
            set_gradients([weights], 10 * step + micro_batch)
            average = average + (1 - beta1) * weights.grad
            average_sq = average_sq + (1 - beta2) * weights.grad**2
            optimizer.accumulate(weights, first=micro_batch == 0)
        optimizer.apply(weights)
        denominator = (average_sq / (1 - beta2**step)).sqrt() + SETTINGS["eps"]
        start = start * (1 - 1e-2 * 0.1) - 1e-2 * average / (1 - beta1**step) / denominator
    error = (weights.detach() - start).abs()
    assert float(error.max()) < {32: 1e-14, 8: 4e-3}[bits]  # steps are of 1e-2
    assert float(error.mean()) < {32: 1e-14, 8: 4e-4}[bits]
    assert optimizer.state[weights]["step"] == 2


def test_steps_out_of_order_are_refused():
    weights = parameters()[0]
    optimizer = SlicedAdamW([weights])
    with pytest.raises(ValueError, match="has no gradient"):
        optimizer.update(weights)
    set_gradients([weights], 0)
    for misuse in (lambda: optimizer.accumulate(weights, first=False), lambda: optimizer.apply(weights)):
        with pytest.raises(ValueError, match="first=True"):
            misuse()
    assert optimizer.state[weights]["step"] == 0
    optimizer.update(weights)
    with pytest.raises(ValueError, match="first=True"):
        optimizer.apply(weights)


@each_width
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bit_identical(bits, dtype):
    through = parameters(dtype)
    train(SlicedAdamW(through, **SETTINGS, state_bits=bits, seed=3), through, range(6))
    weights = parameters(dtype)
    optimizer = SlicedAdamW(weights, **SETTINGS, state_bits=bits, seed=3)
    train(optimizer, weights, range(3))
    state = saved_and_loaded(optimizer)
    resumed = [torch.nn.Parameter(weight.detach().clone()) for weight in weights]
    optimizer = SlicedAdamW(resumed, lr=5.0, state_bits=bits)  # settings come with the state, as torch has it
    torch.manual_seed(99)
    optimizer.load_state_dict(state)
    held = optimizer.state[resumed[0]]
    types = {name: value.dtype for name, value in held.items() if isinstance(value, torch.Tensor)}
    assert set(types.values()) == ({torch.float32} if bits == 32 else {torch.uint8, torch.float32})
    assert all(torch.equal(value, state["state"][0][name]) for name, value in held.items() if name in types)
    train(optimizer, resumed, range(3, 6))
    for mine, other in zip(resumed, through, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("bits", [8, 4])
def test_moments_given_as_numbers_are_coded_again(bits):
    weights = parameters()
    config = OptimizerConfig({8: "adamw8bit", 4: "adamw4bit"}[bits])
    optimizer, resumed = (build_optimizer(torch.nn.ParameterList(weights), config) for _ in range(2))
    train(optimizer, weights, range(3))
    state = saved_and_loaded(optimizer)
    [entry] = [each for each in state["state"].values() if each["bits"] == bits]
    for name in MOMENTS:
        entry[name] = decode_moment(entry, name, 6300).view(70, 90)
        del entry[f"{name}_codes"], entry[f"{name}_scales"]
    resumed.load_state_dict(state)
    before, after = optimizer.state[weights[0]], resumed.state[weights[0]]
    assert before.keys() == after.keys()
    for name, value in before.items():  # a scale is the largest number, which may be rounded in its last bit
        rtol = 2e-7 if name.endswith("scales") else 0
        torch.testing.assert_close(torch.as_tensor(after[name]), torch.as_tensor(value), rtol=rtol, atol=0)


def test_rounding_follows_the_seed_and_not_the_global_generator():
    def trained(seed, global_seed):
        torch.manual_seed(global_seed)
        weights = parameters(torch.bfloat16)
        train(SlicedAdamW(weights, **SETTINGS, seed=seed), weights, range(3))
        return weights[0]

    assert torch.equal(trained(1, 1), trained(1, 2))
    assert not torch.equal(trained(1, 1), trained(2, 1))
    state = torch.get_rng_state()
    weights = parameters(torch.bfloat16)
    train(SlicedAdamW(weights, state_bits=8), weights, range(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_slices_steps_parameters_and_micro_batches_are_rounded_by_unrelated_draws(monkeypatch):
    positions = []
    monkeypatch.setattr(adamw, "SLICE_ELEMENTS", 4096)
    draw = adamw.draw_int16
    monkeypatch.setattr(adamw, "draw_int16", lambda n, device, *p: positions.append(p) or draw(n, device, *p))
    weights = parameters(torch.bfloat16, shapes=((100, 100), (100, 100)))
    optimizer = SlicedAdamW(weights, state_bits=8)
    train(optimizer, weights, range(2))
    for first in (True, False):
        optimizer.accumulate(weights[0], first=first)
    optimizer.apply(weights[0])
    updates = 2 * 2 * 3 * 3  # parameters, steps, slices; two moments and the weights
    folds = 3 * (2 * 2 + 1)
    assert len(positions) == len(set(positions)) == updates + folds


@pytest.mark.parametrize("bits", [8, 4])
def test_state_of_another_width_is_refused(bits):
    weights = parameters()
    optimizer = SlicedAdamW(weights, state_bits=bits)
    train(optimizer, weights, range(1))
    with pytest.raises(UserError, match=rf"^state_bits: 32, but the checkpoint holds {bits}-bit state. Go on with .*"):
        SlicedAdamW(parameters()).load_state_dict(optimizer.state_dict())
    with pytest.raises(UserError, match="the state of another optimizer"):
        SlicedAdamW(parameters()).load_state_dict(torch.optim.AdamW(parameters()).state_dict())


def test_groups_and_schedules_are_read_at_each_update():
    def build(kind):
        weights = parameters()
        groups = [{"params": weights[:1], "lr": 0.1, "weight_decay": 0.3}, {"params": weights[1:]}]
        optimizer = kind(groups, lr=1e-2, weight_decay=0.0)
        return weights, optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step))

    results = []
    for kind in (SlicedAdamW, torch.optim.AdamW):
        weights, optimizer, schedule = build(kind)
        for step in range(4):
            set_gradients(weights, step)
            optimizer.step()
            schedule.step()
            if step == 1:  # the groups are new objects after loading
                optimizer.load_state_dict(optimizer.state_dict())
        results.append(weights)
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


def test_step_runs_the_closure_and_skips_parameters_without_a_gradient():
    weights = parameters()
    optimizer = SlicedAdamW(weights)
    before = [weight.detach().clone() for weight in weights]

    def closure():
        loss = weights[0].square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert float(loss.detach()) == pytest.approx(float(before[0].square().sum()))
    assert [torch.equal(weight, old) for weight, old in zip(weights, before, strict=True)] == [False, True, True]


def test_a_gradient_of_other_strides_is_read_in_the_order_of_the_weights():
    ours, theirs = parameters(shapes=((40, 50),)), parameters(shapes=((40, 50),))
    gradient = torch.randn(50, 40).t()
    for weights, kind in ((ours, SlicedAdamW), (theirs, torch.optim.AdamW)):
        weights[0].grad = gradient
        kind(weights, **SETTINGS).step()
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"state_bits": 16}, "state_bits: 16 is not supported. Give 32, 8 or 4."),
        ({"lr": -1.0}, "SlicedAdamW.lr: -1.0 is out of range. Give a finite number, 0 or more."),
        ({"eps": float("nan")}, "SlicedAdamW.eps: nan is out of range. Give a finite number, 0 or more."),
        (
            {"betas": (0.9, 1.0)},
            "SlicedAdamW.betas: (0.9, 1.0) is out of range. Give a finite number from 0 to below 1.",
        ),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UserError) as error:
        SlicedAdamW(parameters(), **settings)
    assert str(error.value) == message


def test_weights_that_cannot_be_updated_are_refused():
    with pytest.raises(UserError, match=r"^trainer.precision: SlicedAdamW does not train torch.float16"):
        SlicedAdamW(parameters(torch.float16))
    with pytest.raises(UserError, match=r"^model.optimizer.name: .* \(90, 70\) is not"):
        SlicedAdamW([torch.nn.Parameter(torch.ones(70, 90).t())])


def final_loss(kind, dtype=torch.float32, **settings):
    """Train a network whose matrices are large enough for codes on a teacher's answers, whose variance is 1."""
    torch.manual_seed(0)
    teacher = torch.randn(64, 8) / 8
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64), torch.nn.GELU())
    model.append(torch.nn.Linear(64, 8)).to(dtype)
    optimizer = kind(model.parameters(), lr=3e-3, betas=(0.9, 0.98), **settings)
    losses = []
    for _ in range(100):
        inputs = torch.randn(128, 64)
        loss = (model(inputs.to(dtype)).float() - inputs @ teacher).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return sum(losses[-10:]) / 10


@pytest.fixture(scope="module")
def torch_loss():
    return final_loss(torch.optim.AdamW)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "worse"), [(32, 0.03), (8, 0.03), (4, 0.15)])
def test_training_ends_near_torch(torch_loss, dtype, bits, worse):
    assert torch_loss < 0.013
    assert final_loss(SlicedAdamW, dtype, state_bits=bits) == pytest.approx(torch_loss, rel=worse)
