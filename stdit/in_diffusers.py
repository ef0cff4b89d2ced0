"""Let diffusers find `STDiTPipeline` by name: `DiffusionPipeline.from_pretrained` looks for it in its own package.

Imports neither diffusers nor torch: what it adds is added when diffusers is imported.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def offer_pipeline() -> None:
    """Add ``diffusers.STDiTPipeline``, now or when diffusers is imported."""
    if "diffusers" in sys.modules:
        _add_to(sys.modules["diffusers"])
    else:
        sys.meta_path.insert(0, _Finder())


def _add_to(diffusers: ModuleType) -> None:
    """Add the pipeline to the module as a property, so that its import waits for its first use."""
    kind: Any = type(diffusers)
    if not hasattr(kind, "STDiTPipeline"):
        found = property(lambda _: importlib.import_module("stdit.pipelines.pipeline").STDiTPipeline)
        diffusers.__class__ = type(kind.__name__, (kind,), {"STDiTPipeline": found})


class _Finder(MetaPathFinder):
    """Finds diffusers once, and adds the pipeline after its import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "diffusers":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_add(module: ModuleType) -> None:
            execute(module)
            _add_to(sys.modules[fullname])  # it replaces itself there

        spec.loader.exec_module = execute_and_add  # type: ignore[method-assign]
        return spec
