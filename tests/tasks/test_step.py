import torch

from leanbert.tasks.step import SteppedModule


def test_a_batch_is_moved_to_cuda_while_the_device_computes():
    moved = []

    class Batch:
        def to(self, device, non_blocking):
            moved.append((device.type, non_blocking))

    for device in ("cpu", "cuda", "mps"):
        SteppedModule.transfer_batch_to_device(None, Batch(), torch.device(device), 0)
    assert moved == [("cpu", False), ("cuda", True), ("mps", False)]
