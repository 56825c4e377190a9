"""Which precision this device computes fast in."""

from __future__ import annotations

from typing import Literal

import torch

DefaultPrecision = Literal["bf16-mixed", "32-true"]


def default_precision(device_type: str) -> DefaultPrecision:
    """Return `bf16-mixed` where the device has bf16 instructions, else `32-true`.

    Args:
        device_type: "cpu", "cuda" or "mps". On MPS autocast to bf16 is not faster, so it stays in fp32.

    """
    if device_type == "cuda":
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    if device_type == "cpu" and (_cpu_has("_is_avx512_bf16_supported") or _cpu_has("_is_amx_tile_supported")):
        return "bf16-mixed"
    return "32-true"


def has_16_bit_products(device_type: str) -> bool:
    """Return whether bfloat16 matrix products are no slower than those in float32; without AVX-512 a CPU has none."""
    return device_type != "cpu" or torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def _cpu_has(check: str) -> bool:
    function = getattr(torch.cpu, check, None)
    return bool(function()) if function is not None else False
