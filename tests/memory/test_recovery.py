import gc
import weakref

import pytest
import torch

from leanbert.memory.recovery import agree, is_out_of_memory, retry_smaller
from leanbert.memory.step import backpropagate_all_but_last
from tests.limit import AllocatorLimit
from tests.tiny import PlainTask, tiny_model, unequal_batch


def test_the_smaller_micro_batch_fits_and_gives_the_same_gradients():
    model, twin, batch = tiny_model(), tiny_model(), unequal_batch()
    micro_batch, sizes = len(batch), []
    with AllocatorLimit(10**9) as whole:
        backpropagate_all_but_last(PlainTask(model), batch)[0].backward()
    model.zero_grad(set_to_none=True)

    def attempt():
        sizes.append(micro_batch)
        return backpropagate_all_but_last(PlainTask(model), batch, micro_batch=micro_batch)[0].backward()

    def shrink(error):
        nonlocal micro_batch
        model.zero_grad(set_to_none=True)
        micro_batch //= 2
        return micro_batch > 0

    gc.collect()
    with AllocatorLimit(int(0.6 * whole.peak_bytes)) as limit:
        retry_smaller(attempt, shrink)
    assert limit.raised == len(sizes) - 1 > 0
    backpropagate_all_but_last(PlainTask(twin), batch)[0].backward()
    for parameter, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-6, atol=1e-12)


def test_activations_of_the_failed_attempt_are_freed_before_the_next():
    alive = []

    def attempt():
        if alive:
            return alive[0]() is None
        big = torch.zeros(1000)
        alive.append(weakref.ref(big))
        raise torch.OutOfMemoryError("no")

    assert retry_smaller(attempt, lambda error: True)


def test_other_errors_and_hopeless_cases_go_on():
    def fail(error):
        def attempt():
            raise error

        return attempt

    with pytest.raises(RuntimeError, match="shape"):
        retry_smaller(fail(RuntimeError("shape mismatch")), lambda error: True)
    with pytest.raises(torch.OutOfMemoryError, match="no more"):
        retry_smaller(fail(torch.OutOfMemoryError("no more")), lambda error: False)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("x"), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("MPS backend out of memory"), True),
        (RuntimeError("size mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, expected):
    assert is_out_of_memory(error) is expected


def test_what_torch_raises_counts():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_ranks_agree():
    assert agree(lambda: 5, lambda failed: False) == 5
    with pytest.raises(torch.OutOfMemoryError, match="another rank"):
        agree(lambda: 5, lambda failed: True)

    def attempt():
        raise torch.OutOfMemoryError("mine")

    with pytest.raises(torch.OutOfMemoryError, match="mine"):
        agree(attempt, lambda failed: failed)
