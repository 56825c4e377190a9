"""Short names of classes in configurations, and those that older code has saved."""

from pathlib import Path

import pytest
import yaml

from leanbert.class_paths import MODULES, find_class, in_arguments, whole_path, with_whole_paths
from leanbert.settings import load_settings

MONITOR = "leanbert.callbacks.reporting.memory_monitor.MemoryMonitor"


@pytest.mark.parametrize("name", MODULES)
def test_each_class_is_where_the_list_says(name):
    found = find_class(name)
    assert found.__name__ == name
    assert f"{found.__module__}.{name}" == whole_path(name)


def test_short_names_public_names_and_older_paths_are_the_same_class():
    older = "leanbert.callbacks.memory_monitor.MemoryMonitor"
    for name in ("MemoryMonitor", "leanbert.callbacks.MemoryMonitor", older, MONITOR):
        assert whole_path(name) == MONITOR
    for name in ("mine.MemoryMonitor", "leanbert.callbacks.Unknown", "Unknown", "leanberth.MemoryMonitor"):
        assert whole_path(name) == name


def test_only_class_paths_are_changed():
    settings = {"a": [{"class_path": "MemoryMonitor", "init_args": {"text": "MemoryMonitor"}}], "class_path": None}
    assert with_whole_paths(settings) == {
        "a": [{"class_path": MONITOR, "init_args": {"text": "MemoryMonitor"}}],
        "class_path": None,
    }
    assert load_settings("class_path: MemoryMonitor\nrate: 1e-3") == {"class_path": MONITOR, "rate": 0.001}


def test_of_options_only_those_that_take_a_class_are_changed():
    words = ["fit", "--trainer.callbacks+=MemoryMonitor", "--model", "MaskedLM", "--data.text_field", "MemoryMonitor"]
    assert in_arguments(words) == [
        "fit", f"--trainer.callbacks+={MONITOR}", "--model", "leanbert.tasks.mlm.MaskedLM",
        "--data.text_field", "MemoryMonitor",
    ]  # fmt: skip


def test_shipped_configurations_have_short_names():
    for path in Path("configs").rglob("*.yaml"):
        found = []

        def gather(value, found=found):
            if isinstance(value, dict):
                found += [value["class_path"]] if "class_path" in value else []
                value = list(value.values())
            for part in value if isinstance(value, list) else ():
                gather(part)

        gather(yaml.safe_load(path.read_text(encoding="utf-8")))
        assert set(found) <= MODULES.keys(), path
