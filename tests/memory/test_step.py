import os
import socket

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional as F

from leanbert.memory.step import backpropagate_all_but_last, optimizer_step, seed_position
from tests.tiny import PlainTask, tiny_model, unequal_batch


def reference_gradients(model, batch):
    """Of the mean loss over all targets of the big batch, in one backward pass written out by hand."""
    task = PlainTask(model)
    loss = task.loss_sum(batch) / (batch.targets != -100).sum()
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return loss.item(), gradients


def relative_difference(gradients, expected):
    difference = sum(float((gradients[name] - expected[name]).square().sum()) for name in expected)
    return (difference / sum(float(value.square().sum()) for value in expected.values())) ** 0.5


@pytest.mark.parametrize("preset", ["bert", "modern"])
@pytest.mark.parametrize("micro_batch", [None, 2, 3])  # 1, 4 and 3 micro-batches, the last of 3 is smaller
def test_gradients_equal_the_big_batch(preset, micro_batch):
    model, batch = tiny_model(preset=preset), unequal_batch()
    counts = [int((part.targets != -100).sum()) for part in batch.split(2)]
    assert len(set(counts)) > 1, "micro-batches must have unequal numbers of targets"
    expected_loss, expected = reference_gradients(model, batch)
    last, total = backpropagate_all_but_last(PlainTask(model), batch, micro_batch=micro_batch)
    last.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert relative_difference(gradients, expected) <= 1e-6
    assert total.item() == pytest.approx(expected_loss, rel=1e-6)


def test_a_mean_of_means_would_be_wrong():
    """The check above can fail: the usual recipe shifts the gradients of this very batch."""
    model, batch = tiny_model(), unequal_batch()
    _, expected = reference_gradients(model, batch)
    parts = batch.split(2)
    for part in parts:
        task = PlainTask(model)
        (task.loss_sum(part) / task.count_targets(part) / len(parts)).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert relative_difference(gradients, expected) > 1e-2


def test_optimizer_step_updates_and_frees_gradients():
    model, twin, batch = tiny_model(), tiny_model(), unequal_batch()
    _, expected = reference_gradients(twin, batch)
    loss = optimizer_step(PlainTask(model), batch, torch.optim.SGD(model.parameters(), lr=0.5), micro_batch=2)
    for (name, parameter), before in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert parameter.grad is None
        torch.testing.assert_close(parameter.data, before.data - 0.5 * expected[name], rtol=0, atol=1e-9)
    assert loss.requires_grad is False


def test_dropout_is_a_function_of_position():
    model, batch = tiny_model(preset="bert", dropout=0.1, attention_dropout=0.1), unequal_batch()

    def loss(step):
        model.zero_grad(set_to_none=True)
        return backpropagate_all_but_last(
            PlainTask(model),
            batch,
            micro_batch=2,
            seed_micro_batch=lambda index: seed_position(7, step, 0, index),
        )[1]

    first = loss(3)
    torch.rand(5)  # something else draws random numbers
    assert torch.equal(loss(3), first)
    assert not torch.equal(loss(4), first)


def test_neighbouring_positions_draw_unrelated_numbers():
    draws = []
    for position in [(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 0), (0, 1, 0, 0), (1, 0, 0, 0)]:
        seed_position(*position)
        draws.append(torch.rand(1000))
    correlation = torch.corrcoef(torch.stack(draws))
    assert (correlation - torch.eye(5)).abs().max() < 0.15


def _rank(rank, port, micro_batch, queue):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    model = tiny_model()
    parallel = nn.parallel.DistributedDataParallel(model)
    batch = unequal_batch().split(4)[rank]  # ranks have unequal numbers of targets

    def sum_over_ranks(value):
        torch.distributed.all_reduce(value)
        return value

    last, total = backpropagate_all_but_last(
        PlainTask(parallel),
        batch,
        micro_batch=micro_batch,
        world_size=2,
        sum_over_ranks=sum_over_ranks,
        no_sync=parallel.no_sync,
    )
    last.backward()
    if rank == 0:
        loss = sum_over_ranks(total).item()
        queue.put((loss, {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}))
    else:
        sum_over_ranks(total)
    torch.distributed.barrier()
    os._exit(0)  # taking the process group down has hung on a busy machine


@pytest.mark.parametrize("micro_batch", [4, 1])  # 1 and 4 micro-batches on each of 2 ranks
def test_gradients_equal_the_big_batch_under_ddp(micro_batch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    processes = [context.Process(target=_rank, args=(rank, port, micro_batch, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    loss, gradients = queue.get()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    expected_loss, expected = reference_gradients(tiny_model(), unequal_batch())
    gradients = {name: torch.from_numpy(value) for name, value in gradients.items()}
    assert relative_difference(gradients, expected) <= 1e-6
    assert loss == pytest.approx(expected_loss, rel=1e-6)


def fake_peak(micro_batch):
    """Passes, parameter bytes and the tracker's peak bytes by category of one fake step."""
    passes = []
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, batch = tiny_model(dtype=torch.float32), unequal_batch()
        optimizer = torch.optim.AdamW(model.parameters())
        tracker = MemTracker()
        tracker.track_external(model, optimizer)

        def next_micro_batch(index):
            passes.append(index)
            tracker.reset_mod_stats()  # the tracker refuses a second forward of a module otherwise

        with tracker:
            optimizer_step(
                PlainTask(model), batch, optimizer, micro_batch=micro_batch, seed_micro_batch=next_micro_batch
            )
        peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    parameter_bytes = 4 * sum(parameter.numel() for parameter in model.parameters())
    return passes, parameter_bytes, {getattr(kind, "value", kind): size for kind, size in peak.items()}


def test_runs_under_fake_tensors_and_a_memory_tracker():
    passes, parameter_bytes, whole = fake_peak(None)
    assert passes == [0]
    parts, _, quarter = fake_peak(2)
    assert parts == [0, 1, 2, 3]
    for peak in (whole, quarter):
        assert peak["Parameter"] == parameter_bytes
    assert quarter["Activation"] < whole["Activation"]


def test_loss_sum_ignores_unused_slots():
    model, batch = tiny_model(), unequal_batch()
    logits = model(batch.inputs, batch.target_index)
    by_hand = sum(
        F.cross_entropy(logits[row, slot], batch.targets[row, slot]).item()
        for row in range(8)
        for slot in range(6)
        if batch.targets[row, slot] >= 0
    )
    assert PlainTask(model).loss_sum(batch).item() == pytest.approx(by_hand)
