"""Which precision this device computes fast in."""

from __future__ import annotations

import os
from typing import Literal

import torch

from leanbert.measure.torch_compat import cpu_computes_bf16

DefaultPrecision = Literal["bf16-mixed", "32-true"]
_LIMITS_WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")
"""Values of `ONEDNN_MAX_CPU_ISA`, by which a user limits oneDNN to older instructions than the CPU has."""


def default_precision(device_type: str) -> DefaultPrecision:
    """Return `bf16-mixed` where the device has bf16 instructions, else `32-true`.

    Args:
        device_type: "cpu", "cuda" or "mps". On MPS autocast to bf16 is not faster, so it stays in fp32. CUDA that is
            planned for and not here is taken for one of today's.

    """
    if device_type == "cuda":
        here = torch.cuda.is_available()
        return "bf16-mixed" if not here or torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() not in _LIMITS_WITHOUT_BF16
    computes = device_type == "cpu" and allowed and has_16_bit_products("cpu") and cpu_computes_bf16()
    return "bf16-mixed" if computes else "32-true"


def has_16_bit_products(device_type: str) -> bool:
    """Return whether bfloat16 matrix products are no slower than those in float32; without AVX-512 a CPU has none."""
    return device_type != "cpu" or torch.backends.cpu.get_cpu_capability().startswith("AVX512")
