"""Importing torchmetrics without all that it knows: Lightning needs two of its classes.

`import torchmetrics` imports each of its metrics, and with them scipy, transformers, pandas and torchvision wherever
they are installed: 2 of 6 seconds (torchmetrics issues 2242 and 3457). Here its packages are made without running their
`__init__`, and the few modules that are needed are imported. Whoever asks for anything else, gets all of torchmetrics,
imported as usual.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

PACKAGE = "torchmetrics"
OWN = {"__about__": "__version__", "metric": "Metric", "collections": "MetricCollection"}
"""What of the package itself Lightning uses, by module."""
MODULES = (
    "aggregation",
    "functional.classification.accuracy",
    "functional.classification.f_beta",
    "functional.classification.matthews_corrcoef",
    "functional.regression.spearman",
    "text.sacre_bleu",
)
"""What LeanBERT's tasks use."""


def install() -> None:
    """Import what is needed of torchmetrics; nothing happens where it is imported already."""
    if PACKAGE in sys.modules:
        return
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        for module, name in OWN.items():
            found = importlib.import_module(f"{PACKAGE}.{module}")
            setattr(sys.modules[PACKAGE], name, getattr(found, name))
        for module in MODULES:
            importlib.import_module(f"{PACKAGE}.{module}")
        finder.complete = True
    except (ImportError, AttributeError):  # a version that is made otherwise is imported as usual
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
            del sys.modules[name]


class _Deferred(ModuleType):
    """A package whose `__init__` runs when something is asked for that it does not have yet."""

    def __getattr__(self, name: str) -> Any:
        finder = self.__spec__.loader.finder
        if finder.complete:
            finder.import_all()
        else:
            _run(self)
        return getattr(self, name)


def _run(module: ModuleType) -> None:
    if isinstance(module, _Deferred):
        own = module.__spec__.loader.own
        module.__class__ = ModuleType
        module.__spec__.loader = module.__loader__ = own
        own.exec_module(module)


class _Loader:
    """Makes a package and runs nothing."""

    def __init__(self, own: Any, finder: _Finder) -> None:
        self.own, self.finder = own, finder

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__class__ = _Deferred
        if module.__name__ == PACKAGE:
            module._logger = logging.getLogger(PACKAGE)  # type: ignore[attr-defined]


class _Finder:
    """Finds modules of torchmetrics: until `complete` its packages are deferred, after it another module wants all."""

    complete = False

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.partition(".")[0] != PACKAGE:
            return None
        if self.complete:
            self.import_all()
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.submodule_search_locations is not None:
            spec.loader = _Loader(spec.loader, self)  # type: ignore[assignment]
        return spec

    def import_all(self) -> None:
        """Run what was deferred, the package itself last, whose `__init__` begins with the others."""
        with suppress(ValueError):  # removed already
            sys.meta_path.remove(self)
        package, *inner = [module for module in list(sys.modules.values()) if isinstance(module, _Deferred)]
        for module in (*inner, package):
            _run(module)
