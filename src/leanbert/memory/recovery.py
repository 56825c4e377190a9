"""Recovery from running out of memory: the step is replayed with half the micro-batch."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` says that a device or the host has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    texts = ("can't allocate memory", "not enough memory", "out of memory", "cublas_status_alloc_failed")
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in texts)


def retry_smaller(attempt: Callable[[], Result], shrink: Callable[[BaseException], bool]) -> Result:
    """Return the result of `attempt`; when memory runs out, call `shrink` and try again.

    `shrink` undoes what the attempt has left behind and makes the next one smaller; it returns False when it cannot,
    and the error goes on. It is called after the exception is done with, for its traceback holds the activations
    of the failed attempt.
    """
    while True:
        result, failure = _tried(attempt)
        if failure is None:
            return result  # type: ignore[return-value]
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if not shrink(failure):
            raise failure


def agree(attempt: Callable[[], Result], any_rank: Callable[[bool], bool]) -> Result:
    """Return the result of `attempt` if it succeeded on all ranks; else raise `torch.OutOfMemoryError` on all.

    `any_rank` exchanges whether one has failed. Every rank must make the same calls.
    """
    result, failure = _tried(attempt)
    if any_rank(failure is not None):
        del result
        raise failure or torch.OutOfMemoryError("another rank ran out of memory")
    return result  # type: ignore[return-value]


def _tried(attempt: Callable[[], Result]) -> tuple[Result | None, BaseException | None]:
    """Return the result of `attempt`, or the error that says that memory has run out."""
    try:
        return attempt(), None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None, error.with_traceback(None)  # frees the frames, and with them the activations
