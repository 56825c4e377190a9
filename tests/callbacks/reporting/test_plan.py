from types import SimpleNamespace

import pytest
import torch

from leanbert.callbacks.reporting.plan import PlanReport

GIB = 2**30


@pytest.mark.parametrize(("budget", "answer", "share"), [
    (10 * GIB, {"process_base_bytes": 2 * GIB}, 0.1), (10 * GIB, None, 0.125), (100 * GIB, None, 1.0),
])  # fmt: skip
def test_the_allocator_has_the_budget_without_the_context(monkeypatch, budget, answer, share):
    set_to = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *given: set_to.append(given))
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda")))
    PlanReport(1, 2, budget, answer).setup(trainer, None, "fit")
    assert set_to == [(share, torch.device("cuda"))]
