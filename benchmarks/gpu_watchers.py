"""Callbacks that look on in `benchmarks/gpu.py`: for what the host waits in a step, and which gradients it makes."""

from __future__ import annotations

import traceback
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
READS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten._unique2.default)
"""Operations whose results the host has to know: on CUDA each waits for the device."""

SIGN = "called a synchronizing CUDA operation"
"""What CUDA's debug mode warns of; of itself it warns in other words."""


class Synchronisations(Callback):
    """Note where the host waits for the device, or on a CPU would, from the fourth to the eighth step of `fit`.

    On CUDA the device's runtime tells (`torch.cuda.set_sync_debug_mode`); elsewhere operations that give a value back
    are noted. `places` has file and line of each.
    """

    first, last = 4, 8

    def __init__(self, device_type: str) -> None:
        self.device_type = device_type
        self.places: list[str] = []
        self._exit = ExitStack()
        self._warned: Any = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        """Begin with the fourth step."""
        if trainer.global_step + 1 == self.first:
            if self.device_type == "cuda":
                self._warned = self._exit.enter_context(warnings.catch_warnings(record=True))
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                self._exit.callback(torch.cuda.set_sync_debug_mode, "default")
            else:
                self._exit.enter_context(_Reads(self.places))

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """End with the eighth."""
        if trainer.global_step == self.last:
            self._exit.close()
            found = [warned for warned in self._warned if SIGN in str(warned.message)]
            self.places += [f"{Path(warned.filename).name}:{warned.lineno}" for warned in found]


class _Reads(TorchDispatchMode):
    def __init__(self, places: list[str]) -> None:
        super().__init__()
        self.places = places

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            ours = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename][:-1]
            self.places.append(f"{Path(ours[-1].filename).name}:{ours[-1].lineno}")
        return func(*args, **(kwargs or {}))


class GradientKeeper(Callback):
    """Keep loss and gradients of each step, on the CPU."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, dict[str, torch.Tensor]]] = []
        self._gradients: dict[str, torch.Tensor] = {}

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        """Copy the gradients."""
        named = module.model.named_parameters()
        self._gradients = {name: p.grad.detach().cpu().double() for name, p in named if p.grad is not None}

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        """Keep the step."""
        self.steps.append((float(outputs["step_loss"]), self._gradients))
