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
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

PACKAGE = "torchmetrics"
OWN = {"__about__": "__version__", "metric": "Metric", "collections": "MetricCollection"}
"""What of the package itself Lightning uses, by module."""
PLOTS = f"{PACKAGE}.utilities.plot"
"""Imports matplotlib's pyplot where it is there: half a second for figures that LeanBERT does not draw."""
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
    sys.meta_path.insert(0, _PACKAGES)
    try:
        requirements: Any = importlib.import_module(f"{PACKAGE}.utilities.imports")
        matplotlib, requirements._MATPLOTLIB_AVAILABLE = requirements._MATPLOTLIB_AVAILABLE, False
        for module, name in OWN.items():
            found = importlib.import_module(f"{PACKAGE}.{module}")
            setattr(sys.modules[PACKAGE], name, getattr(found, name))
        for module in MODULES:
            importlib.import_module(f"{PACKAGE}.{module}")
        requirements._MATPLOTLIB_AVAILABLE = matplotlib
        _PACKAGES.complete = True
    except (ImportError, AttributeError):  # a version that is made otherwise is imported as usual
        sys.meta_path.remove(_PACKAGES)
        for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
            del sys.modules[name]


class _Deferred(ModuleType):
    """A package whose `__init__` runs when something is asked for that it does not have yet."""

    def __getattr__(self, name: str) -> Any:
        if _PACKAGES.complete and _PACKAGES in sys.meta_path:
            _PACKAGES.import_all()
        _PACKAGES.run(self)
        return getattr(self, name)


class _Packages(MetaPathFinder, Loader):
    """Finds torchmetrics: until it is `complete` packages are made and not run, after it another module wants all."""

    def __init__(self) -> None:
        self.complete = False
        self._loaders: dict[str, Any] = {}  # that run a package's `__init__`, by its name

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.partition(".")[0] != PACKAGE:
            return None
        if self.complete:
            self.import_all()
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.submodule_search_locations is not None:
            self._loaders[name], spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__class__ = _Deferred
        if module.__name__ == PACKAGE:
            module._logger = logging.getLogger(PACKAGE)  # type: ignore[attr-defined]

    def run(self, module: ModuleType) -> None:
        """Run a package's `__init__`, unless that was done."""
        if isinstance(module, _Deferred):
            own = self._loaders[module.__name__]
            module.__class__ = ModuleType  # type: ignore[assignment]
            module.__loader__ = own
            if module.__spec__ is not None:
                module.__spec__.loader = own
            own.exec_module(module)

    def import_all(self) -> None:
        """Run what was deferred, the package itself last, whose `__init__` begins with the others."""
        sys.meta_path.remove(self)
        importlib.reload(sys.modules[PLOTS])  # with matplotlib; who has its functions has the new ones
        package, *inner = [module for module in list(sys.modules.values()) if isinstance(module, _Deferred)]
        for module in (*inner, package):
            self.run(module)


_PACKAGES = _Packages()
