"""Let diffusers find our classes by name, for which it looks in its own package.

`DiffusionPipeline.from_pretrained` looks for the pipeline there, `from_single_file` for the model. Imports neither
diffusers nor torch: what it adds is added when diffusers is imported.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

OFFERED = {"STDiT": "stdit.models.stdit", "STDiTPipeline": "stdit.pipelines.pipeline"}
"""Class to the module that defines it."""


def offer_classes() -> None:
    """Add our classes to the module diffusers, now or when it is imported."""
    if "diffusers" in sys.modules:
        _add_to(sys.modules["diffusers"])
    else:
        sys.meta_path.insert(0, _Finder())


def _add_to(diffusers: ModuleType) -> None:
    """Add the classes to the module as properties, so that their import waits for their first use."""
    kind: Any = type(diffusers)
    if not hasattr(kind, next(iter(OFFERED))):
        diffusers.__class__ = type(kind.__name__, (kind,), {name: _lazy(name) for name in OFFERED})


def _lazy(name: str) -> property:
    return property(lambda _: getattr(importlib.import_module(OFFERED[name]), name))


class _Finder(MetaPathFinder):
    """Finds diffusers, and adds our classes after its import; others may look for it before."""

    looking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "diffusers" or self.looking:
            return None
        self.looking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.looking = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_add(module: ModuleType) -> None:
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            execute(module)
            _add_to(sys.modules[fullname])  # it replaces itself there

        spec.loader.exec_module = execute_and_add  # type: ignore[method-assign]
        return spec
