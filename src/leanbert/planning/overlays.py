"""The overlays of `configs/memory/` as settings and as objects: what the plan tries, and what it chooses."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from leanbert.class_paths import find_class
from leanbert.planning.run_settings import RunSettings, Strategy
from leanbert.settings import find_shipped, parse_yaml

MICRO_BATCH = ("accumulation", "layer_major")
"""Overlays whose callback has a micro-batch."""

SHARDED = "fsdp"
"""The overlay of `configs/strategy` that shares out the model too."""


def read(name: str, micro_batch: int | None = None) -> dict[str, Any]:
    """Return `configs/memory/NAME.yaml` as nested settings, with another micro-batch if one is given; or `SHARDED`."""
    folder = "strategy" if name == SHARDED else "memory"
    _, path = find_shipped(["--config", f"configs/{folder}/{name}.yaml"])
    settings: dict[str, Any] = parse_yaml(Path(path).read_text(encoding="utf-8"))
    if micro_batch is not None and name in MICRO_BATCH:
        settings["trainer"]["callbacks+"][0]["init_args"]["micro_batch"] = micro_batch
    return settings


def merge(overlays: list[dict[str, Any]]) -> dict[str, Any]:
    """Return settings of which later ones count, and lists of callbacks are joined."""
    merged: dict[str, Any] = {}
    for overlay in overlays:
        _merge_into(merged, copy.deepcopy(overlay))
    return merged


def _merge_into(target: dict[str, Any], extra: dict[str, Any]) -> None:
    for key, value in extra.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _merge_into(target[key], value)
        elif key == "callbacks+" and key in target:
            target[key] += value
        else:
            target[key] = value


def apply(settings: RunSettings, overlay: dict[str, Any]) -> RunSettings:
    """Return the settings of a run with an overlay; a callback that is there already gives way to the overlay's."""
    task, data = copy.deepcopy(settings.task), copy.deepcopy(settings.data)
    added = [_make(entry) for entry in overlay.get("trainer", {}).get("callbacks+", [])]
    kinds = {type(callback) for callback in added}
    kept = (callback for callback in settings.callbacks if type(callback) not in kinds)
    optimizer = overlay.get("model", {}).get("init_args", {}).get("optimizer", {})
    task.optimizer_config = replace(task.optimizer_config, **optimizer)
    data.hparams.update(overlay.get("data", {}).get("init_args", {}))
    strategy: Strategy = "fsdp2" if overlay.get("trainer", {}).get("strategy") == SHARDED else settings.strategy
    return replace(settings, task=task, data=data, callbacks=(*kept, *added), strategy=strategy)


def _make(entry: dict[str, Any]) -> Any:
    return find_class(entry["class_path"])(**entry.get("init_args", {}))
