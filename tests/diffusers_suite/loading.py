"""diffusers' own shared tests, from a copy of its repository: ``DIFFUSERS_TESTS=DIR``.

DIR is the repository, or its folder ``tests``. The tests are loaded under another name, since ours are ``tests`` as
well. Those that ask for an accelerator run on the CPU.
"""

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PACKAGE = "diffusers_tests"
_LIFTED = (
    "require_accelerator",
    "require_torch_accelerator",
    "require_torch_accelerator_with_training",
    "require_hf_token",  # nothing is fetched from the hub
    "nightly",
)


def diffusers_tests(module: str) -> Any:
    """Import a module of diffusers' tests, such as ``models.testing_utils``; skip the importing one without them."""
    if not (given := os.environ.get("DIFFUSERS_TESTS")):
        pytest.skip("DIFFUSERS_TESTS is not set: diffusers' repository", allow_module_level=True)
    folder = Path(given).resolve()
    if (folder / "tests" / "testing_utils.py").is_file():
        folder = folder / "tests"
    if not (folder / "testing_utils.py").is_file():
        pytest.fail(f"DIFFUSERS_TESTS = {given}: must be diffusers' repository, or its folder tests")
    if PACKAGE not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None
        package = sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(package)
        shared = importlib.import_module(f"{PACKAGE}.testing_utils")
        for name in _LIFTED:
            setattr(shared, name, lambda test: test)
    return importlib.import_module(f"{PACKAGE}.{module}")


def define(namespace: dict[str, Any], name: str, *bases: type, **attributes: Any) -> None:
    """Define a test class in a module."""
    namespace[name] = type(name, bases, {"__module__": namespace["__name__"], **attributes})


def with_layer_names(module: str, names: dict[str, str]) -> Any:
    """Import a module of diffusers' tests in which the names of layers are replaced."""
    original = diffusers_tests(module)
    source = Path(original.__file__).read_text(encoding="utf-8")
    for name, own in names.items():
        source = source.replace(f'"{name}"', f'"{own}"').replace(f"module.{name}", f"module.{own}")
    adapted = ModuleType(f"{original.__name__}_adapted")
    adapted.__file__, adapted.__package__ = original.__file__, original.__package__
    exec(compile(source, str(original.__file__), "exec"), adapted.__dict__)
    return adapted
