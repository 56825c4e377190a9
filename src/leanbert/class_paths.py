"""Names of the classes that configurations use: short, or as older code saved them; where a class lives may change."""

from __future__ import annotations

import importlib
from typing import Any

MODULES = {
    "ActivationCheckpointing": "callbacks.techniques.activations",
    "ActivationOffload": "callbacks.techniques.activations",
    "ChunkedHead": "callbacks.techniques.activations",
    "ClassificationData": "data.classification",
    "CommunicationMonitor": "callbacks.reporting.communication_monitor",
    "FullySharded": "distributed.strategy",
    "GradientAccumulation": "callbacks.techniques.accumulation",
    "LayerMajor": "callbacks.techniques.activations",
    "MagnitudePruning": "callbacks.techniques.pruning",
    "MaskedLM": "tasks.mlm",
    "MaskedLMData": "data.mlm",
    "MemoryMonitor": "callbacks.reporting.memory_monitor",
    "MovementPruning": "callbacks.techniques.pruning",
    "OptimizerInBackward": "callbacks.techniques.optimizer",
    "OutOfMemoryRecovery": "callbacks.techniques.accumulation",
    "PairData": "data.pairs",
    "Precision": "callbacks.techniques.precision",
    "QuantizationAwareTraining": "callbacks.techniques.quantization",
    "ReturnFreedPages": "callbacks.techniques.allocator",
    "SemanticRoleData": "data.token_labels",
    "SemanticRoleLabelling": "tasks.tagging",
    "Seq2Seq": "tasks.seq2seq",
    "StructuredPruning": "callbacks.techniques.structured",
    "TextClassification": "tasks.classification",
    "TokenClassification": "tasks.tagging",
    "TokenLabelData": "data.token_labels",
}
"""Modules of LeanBERT by the name of the class."""
SETTINGS = ("model", "data", "trainer.callbacks", "trainer.callbacks+", "trainer.strategy")
"""Settings whose value may be a class alone, besides all that end with `class_path`."""


def whole_path(name: str) -> str:
    """Return where a class is: of `MemoryMonitor`, or `leanbert.ANYTHING.MemoryMonitor`; another name as it is."""
    package, _, last = name.rpartition(".")
    ours = last in MODULES and (package == "" or package.split(".")[0] == "leanbert")
    return f"leanbert.{MODULES[last]}.{last}" if ours else name


def with_whole_paths(settings: object) -> Any:
    """Return nested settings with the whole path of each `class_path`."""
    if isinstance(settings, list):
        return [with_whole_paths(value) for value in settings]
    if not isinstance(settings, dict):
        return settings
    return {
        key: whole_path(value) if key == "class_path" and isinstance(value, str) else with_whole_paths(value)
        for key, value in settings.items()
    }


def in_arguments(arguments: list[str]) -> list[str]:
    """Return the arguments of a command line with the whole path of each class."""
    found: list[str] = []
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if equals and _takes_class(name):
            argument = f"{name}={whole_path(value)}"
        elif index and _takes_class(arguments[index - 1]):
            argument = whole_path(argument)
        found.append(argument)
    return found


def _takes_class(option: str) -> bool:
    name = option.removeprefix("--")
    return name != option and (name in SETTINGS or name.rpartition(".")[2] in ("class_path", "help"))


def find_class(name: str) -> Any:
    """Import and return the class of that name or path."""
    module, _, last = whole_path(name).rpartition(".")
    return getattr(importlib.import_module(module), last)
