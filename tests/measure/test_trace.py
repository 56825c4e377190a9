"""Bytes counted by hand, by torch's profiler and under fake tensors must agree with the trace."""

import gc
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import functional as F
from torch.nn.modules import module as module_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from leanbert.distributed.sharding import pretend_group
from leanbert.measure.trace import LiveBytes, live_tensors, phase
from leanbert.memory.step import optimizer_step
from tests.tiny import PlainTask, tiny_model, unequal_batch

PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm"}


def model_bytes(model):
    return sum(value.nbytes for value in (*model.parameters(), *model.buffers()))


def make_step(model, micro_batch=None, autocast=False):
    """A model's optimizer after its first step, which creates the state, and a function that runs one more."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    batch = unequal_batch(rows=16, length=32)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return optimizer_step(PlainTask(model), batch, optimizer, micro_batch=micro_batch)

    step()
    gc.collect()  # what an earlier test left would be freed in the middle of a trace
    return optimizer, step


def test_a_linear_layer_by_hand():
    layer, x = nn.Linear(8, 4), torch.ones(2, 8)
    with LiveBytes(layer) as trace:
        y = layer(x)  # 32 bytes
        y.square().sum().backward()  # 32 and 4 bytes
    timeline = trace.timeline()
    # weight and bias 144, x 64, y 32, its square 32, the sum 4
    assert timeline.by_phase["forward"] == 144 + 64 + 32 + 32 + 4
    # gradients of weight 128 and bias 16; x, y and the gradient of y, the loss and its gradient 4 each
    assert timeline.by_phase["backward"] == timeline.peak_bytes == 144 + 144 + 64 + 32 + 32 + 4 + 4
    assert timeline.by_category == {
        "parameters": 144, "optimizer": 0, "gradients": 144, "activations": 72, "other": 64,
    }  # fmt: skip
    assert timeline.live[-1].sum() == 144 + 144 + 64 + 32  # y is still held here
    assert [(storage.module, storage.size_bytes) for storage in timeline.saved if storage.shape == (2, 4)] == [("", 32)]


def test_views_count_once_and_what_dies_is_taken_off():
    with LiveBytes(nn.Identity()) as trace:
        x = torch.ones(1000)
        y = x.view(10, 100)[:5]
        del x
        assert [storage.size_bytes for storage in trace.live()] == [4000]
        del y
        assert trace.live() == []
    assert trace.timeline().peak_bytes == 4000
    assert trace.timeline().totals[-1] == 0


@pytest.mark.parametrize("micro_batch", [None, 4])
def test_categories_are_exact_and_sum_to_the_peak(micro_batch):
    model = tiny_model(torch.float32)
    optimizer, step = make_step(model, micro_batch)
    with LiveBytes(model, [optimizer]) as trace:
        step()
    timeline = trace.timeline()
    assert sum(timeline.by_category.values()) == timeline.peak_bytes == max(timeline.by_phase.values())
    state = sum(value.nbytes for entry in optimizer.state.values() for value in entry.values())
    at_update = timeline.live[-1]  # gradients are freed by then
    assert dict(zip(timeline.by_category, at_update.tolist(), strict=True))["optimizer"] == state
    assert timeline.by_category["parameters"] == model_bytes(model)
    # of micro-batches, the gradients of all parameters live through every backward pass but the first
    gradients = model_bytes(model) if micro_batch else 0
    assert timeline.live[:, 2].max() == model_bytes(model)
    assert timeline.by_category["gradients"] >= gradients
    assert timeline.live[-1, 2] == 0


def test_the_update_is_a_phase_of_its_own_inside_a_backward_pass_too():
    layer = nn.Linear(8, 4, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)

    def update(parameter):
        with phase("optimizer"):
            optimizer.step()  # makes the momentum, 128 bytes
            parameter.grad = None

    layer.weight.register_post_accumulate_grad_hook(update)
    with LiveBytes(layer, [optimizer]) as trace:
        layer(torch.ones(2, 8)).sum().backward()
    timeline = trace.timeline()
    assert timeline.categories_by_phase["optimizer"]["optimizer"] == 128
    assert timeline.categories_by_phase["optimizer"]["gradients"] == 128  # labelled before the hook freed it
    assert timeline.live[-1].tolist()[:3] == [128, 128, 0]
    assert [name for name, _, _ in timeline.spans] == ["forward", "backward", "optimizer", "backward"]


def test_gradients_that_meet_are_one_gradient():
    """A weight used twice: autograd sums two gradients in place, which a dispatch mode would hide."""
    layer = nn.Linear(64, 64, bias=False)
    x = torch.ones(1, 64)

    def step():
        layer.weight.grad = None
        layer(layer(x).relu()).sum().backward()

    with LiveBytes(layer, existing=[x]) as trace:
        step()
    timeline = trace.timeline()
    assert timeline.live[-1].tolist() == [64 * 64 * 4, 0, 64 * 64 * 4, 0, 256]
    assert timeline.peak_bytes == timeline.totals[0] + profiled_peak(step)


def test_gradients_are_summed_in_place_where_autograd_would():
    weight = nn.Parameter(torch.ones(1000))
    holder = nn.ParameterList([weight])

    def step():
        y = weight.exp()
        (y * 2 + y * 3).sum().backward()

    with LiveBytes(holder) as trace:
        step()
    # the weight, y and two gradients of y, of which one becomes their sum; the loss and its gradient
    assert trace.timeline().by_phase["backward"] == 4 * 4000 + 2 * 4


def profiled_peak(step):
    """Bytes by which a step's allocations exceeded those at its start, from torch's own allocator.

    After its result, a matrix product may allocate copies inside its kernel: whether depends on the processor.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    live = peak = product_until = allocated = 0
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() in PRODUCTS and event.start_ns() > product_until:
            product_until, allocated = event.start_ns() + event.duration_ns(), 0
        elif event.name() == "[memory]":
            allocated += 1
            if event.start_ns() > product_until or allocated == 1:
                live += event.nbytes()
                peak = max(peak, live)
    return peak


@pytest.mark.parametrize(
    ("autocast", "micro_batch", "preset", "tolerance_bytes"),
    [(False, None, "modern", 64), (False, 8, "bert", 64), (True, None, "modern", 64), (True, 8, "bert", 32_768)],
)
def test_the_profiler_agrees(autocast, micro_batch, preset, tolerance_bytes):
    """But for Python's numbers, 8 bytes each, and a sum of two dtypes, which converts 8 x 32 x 64 inside the kernel."""
    model = tiny_model(torch.float32, hidden_size=64, preset=preset, dropout=0.1).train()
    optimizer, step = make_step(model, micro_batch, autocast)
    with LiveBytes(model, [optimizer], existing=live_tensors()) as trace:
        step()
    peak = trace.timeline().peak_bytes - trace.timeline().totals[0]
    expected = profiled_peak(step)
    assert expected > 1_900_000
    assert peak == pytest.approx(expected, rel=0, abs=tolerance_bytes)


def test_validation_in_inference_mode_is_seen_operation_by_operation():
    """There composite operations reach a dispatch mode whole: cross entropy hides its log-softmax."""
    logits, targets = torch.zeros(10, 1000), torch.zeros(10, dtype=torch.int64)

    def evaluate():
        with torch.inference_mode():
            F.cross_entropy(logits, targets)

    with LiveBytes(nn.Identity(), existing=[logits, targets], first_phase="validation") as trace:
        evaluate()
    timeline = trace.timeline()
    assert timeline.by_phase == {"validation": 40_000 + 80 + 40_000 + 4 + 4}  # nll_loss returns the weight, too
    assert timeline.peak_bytes - timeline.totals[0] == profiled_peak(evaluate)


def test_what_an_evaluation_derives_is_of_the_evaluation():
    """A backward pass within it must not pass for that of a step."""
    x = torch.zeros(1000, requires_grad=True)
    with LiveBytes(nn.Identity(), existing=[x], first_phase="validation") as trace:
        torch.autograd.grad(x.exp().sum(), x)
    assert set(trace.timeline().by_phase) == {"validation"}


def test_a_checkpointed_block_keeps_nothing_and_is_computed_again_in_backward():
    class Twice(nn.Module):
        def __init__(self, checkpointed):
            super().__init__()
            self.layer, self.checkpointed = nn.Linear(16, 16), checkpointed

        def part(self, x):
            return self.layer(x).exp().sin()

        def forward(self, x):
            return checkpoint(self.part, x, use_reentrant=False) if self.checkpointed else self.part(x)

    saved = {}
    for checkpointed in (False, True):
        model, x = Twice(checkpointed), torch.ones(4, 16)
        with LiveBytes(model) as trace:
            model(x).sum().backward()
        timeline = trace.timeline()
        saved[checkpointed] = sum(storage.size_bytes for storage in timeline.saved if storage.shape == (4, 16))
        assert timeline.categories_by_phase["backward"]["gradients"] <= model_bytes(model)
        assert timeline.live[-1, 2] == model_bytes(model)
    assert saved == {False: 256, True: 0}  # of linear -> exp -> sin it is exp's result that both exp and sin keep


def test_fake_tensors_give_the_same_bytes():
    def trace(mode):
        with mode:
            model = tiny_model(torch.float32)
            optimizer, step = make_step(model, micro_batch=8)
            with LiveBytes(model, [optimizer]) as trace:
                step()
            return trace.timeline()

    real, fake = trace(nullcontext()), trace(FakeTensorMode())
    assert fake.peak_bytes == real.peak_bytes > 100_000
    assert fake.categories_by_phase == real.categories_by_phase


def test_autocast_copies_of_weights_are_not_activations():
    layer, x = nn.Linear(16, 16), torch.ones(2, 16)
    with LiveBytes(layer) as trace, torch.autocast("cpu", torch.bfloat16):
        layer(x)
    assert trace.timeline().categories_by_phase["forward"]["other"] == 2 * 16 * 4 + 2 * (16 * 16 + 16)


def test_other_devices_do_not_count():
    with LiveBytes(nn.Identity(), device_type="cuda") as trace:
        torch.ones(10)
    assert trace.timeline().peak_bytes == 0


def test_of_a_shard_the_bytes_of_this_device_count():
    """DTensor derives shapes once, on fake tensors as large as the whole, which look as if they were on the device."""
    with pretend_group(4) as mesh:
        whole = distribute_tensor(torch.ones(52, 13), mesh, [Shard(0)])  # of shapes that no operation has met
        with LiveBytes(nn.Identity()) as trace:
            torch.sinh(whole)
    assert trace.timeline().peak_bytes == 2 * 13 * 13 * 4


def test_activations_are_named_by_the_module_that_made_them():
    model = tiny_model(torch.float32)
    with LiveBytes(model) as trace:
        PlainTask(model).loss_sum(unequal_batch()).backward()
    sizes = {}
    for storage in trace.timeline().saved:
        sizes[storage.module] = sizes.get(storage.module, 0) + storage.size_bytes
    rows, length, width = 8, 16, 32
    for layer in (0, 1):
        assert sizes[f"encoder.blocks.{layer}.attention.qkv"] == rows * length * 3 * width * 4
    assert all(name == "" or name in dict(model.named_modules()) for name in sizes)


def test_nothing_is_left_behind():
    model = tiny_model(torch.float32)

    def fail(*_):
        raise RuntimeError("stop")

    hook = model.head.register_forward_pre_hook(fail)
    with LiveBytes(model), pytest.raises(RuntimeError, match="stop"):
        PlainTask(model).loss_sum(unequal_batch())
    hook.remove()
    assert not module_hooks._global_forward_hooks
    assert not module_hooks._global_forward_pre_hooks
    assert all(not parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    with phase("optimizer"):  # no trace: nothing to count in
        assert torch.ones(1).sum() == 1


def test_a_traced_step_computes_the_same_bits():
    def train(traced):
        model = tiny_model(torch.float32, dropout=0.1).train()
        torch.manual_seed(1)
        optimizer, step = make_step(model, micro_batch=8, autocast=True)
        losses = []
        for index in range(4):
            with LiveBytes(model, [optimizer]) if traced and index == 1 else nullcontext():
                losses.append(float(step()))
        return losses, [parameter.clone() for parameter in model.parameters()], torch.get_rng_state()

    plain, traced = train(False), train(True)
    assert plain[0] == traced[0]
    assert all(torch.equal(a, b) for a, b in zip(plain[1], traced[1], strict=True))
    assert torch.equal(plain[2], traced[2])
