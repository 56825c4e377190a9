"""The kind of device that computes, which decides over kernels: in a dry run the one that is planned for."""

from __future__ import annotations

import torch
from torch import Tensor


def target_type(tensor: Tensor) -> str:
    """Return cpu, cuda or mps: where operations with `tensor` run.

    A tensor without values, on the CPU, has a `fake_mode`; that of a dry run knows for what it stands.
    """
    if torch.compiler.is_compiling():  # which has tensors without values of its own
        return tensor.device.type
    return getattr(getattr(tensor, "fake_mode", None), "target", None) or tensor.device.type


def stands_in(tensor: Tensor) -> bool:
    """Return whether `tensor` stands for one on another kind of device."""
    return target_type(tensor) != tensor.device.type


def stands_on_host(tensor: Tensor) -> bool:
    """Return whether `tensor`, in a dry run, stands for one in the memory of a device's host."""
    host = getattr(getattr(tensor, "fake_mode", None), "host", None)
    return host is not None and tensor.untyped_storage() in host
