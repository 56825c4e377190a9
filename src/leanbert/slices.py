"""Work cut into slices, so that what each slice needs for a moment exists for one slice at a time."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def parts(count: int, step: int) -> list[slice]:
    """Return slices of `step` that cover `count`, the last maybe smaller."""
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def rounds(slices: list[slice], like: Tensor, *, alike: bool = False) -> Iterable[slice]:
    """Return the slices that a loop goes through: all, unless a dry run, of which `like` is a tensor, knows better.

    A tensor without values has a `fake_mode`; that of a dry run lets one slice stand for others of the same length.
    Such slices must need the same memory and compute as each other, but for the first, unless that is `alike` too.
    """
    shorten = getattr(getattr(like, "fake_mode", None), "shorten", None)
    return slices if shorten is None else shorten(slices, alike)
