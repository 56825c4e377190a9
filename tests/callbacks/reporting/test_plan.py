from types import SimpleNamespace

import pytest
import torch

from leanbert.callbacks.reporting.plan import PlanReport

GIB = 2**30


@pytest.mark.parametrize(
    ("budget", "context", "share"), [(10 * GIB, 2 * GIB, 0.1), (10 * GIB, 0, 0.125), (100 * GIB, 0, 1.0)]
)
def test_the_allocator_has_the_budget_without_the_context(monkeypatch, budget, context, share):
    set_to = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *given: set_to.append(given))
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda")))
    PlanReport(1, {"budget_bytes": budget, "process_base_bytes": context}).setup(trainer, None, "fit")
    assert set_to == [(share, torch.device("cuda"))]
