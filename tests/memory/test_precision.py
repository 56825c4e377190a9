import pytest
import torch

from leanbert.memory.precision import default_precision, has_16_bit_products


def test_bf16_only_where_there_are_instructions(monkeypatch):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert default_precision("cpu") == "bf16-mixed"
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert default_precision("cpu") == "32-true"
    assert default_precision("mps") == "32-true"


def test_no_bf16_where_the_user_forbids_its_instructions(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    for limit, expected in {"AVX2": "32-true", "avx512_core": "32-true", "AVX512_CORE_BF16": "bf16-mixed"}.items():
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        assert default_precision("cpu") == expected
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")  # ATEN_CPU_CAPABILITY=avx2
    assert default_precision("cpu") == "32-true"


def test_other_devices_have_16_bit_products(monkeypatch):
    assert has_16_bit_products("cuda")
    for capability, expected in {"AVX2": False, "DEFAULT": False, "AVX512": True, "AVX512_BF16": True}.items():
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda name=capability: name)
        assert has_16_bit_products("cpu") is expected


@pytest.mark.parametrize(("here", "supported", "expected"), [
    (False, False, "bf16-mixed"), (True, True, "bf16-mixed"), (True, False, "32-true"),
])  # fmt: skip
def test_cuda_that_is_not_here_is_planned_in_bf16(monkeypatch, here, supported, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: here)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert default_precision("cuda") == expected
