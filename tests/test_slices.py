import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from leanbert.slices import parts, rounds


def test_parts_cover_all_and_the_last_is_smaller():
    assert parts(7, 3) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert parts(0, 3) == []


def test_a_loop_goes_through_all_slices_but_in_a_dry_run():
    class DryRun(FakeTensorMode):
        def shorten(self, slices, alike):
            return slices[int(alike) :][:1]

    slices = parts(6, 1)
    with FakeTensorMode():  # that of a compiler, say
        assert list(rounds(slices, torch.zeros(1))) == slices
    with DryRun():
        like = torch.zeros(1)
    assert list(rounds(slices, torch.zeros(1))) == slices
    assert list(rounds(slices, like)) == slices[:1]
    assert list(rounds(slices, like, alike=True)) == slices[1:2]
