"""The house: a file imports only from its own floor and those below it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [
    "errors checkpoint_files cli",
    "parallel",
    "models",
    "diffusion",
    "codecs",
    "data",
    "pipelines",
    "training",
]
"""From the ground up; config.py composes the settings of all floors, and so lies under the roof."""
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names.split()}
COMPOSER = {"stdit/config.py"}


def imported(path: Path) -> set[str]:
    """Parts of stdit that a file imports at the top, or anywhere, by name: {"models", "errors", ...}."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names |= {m.split(".")[1] for m in modules if m.startswith("stdit.")}
    return names


@pytest.mark.parametrize(
    "path", sorted((ROOT / "stdit").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_imports_point_down(path: Path) -> None:
    part = path.relative_to(ROOT / "stdit").parts[0].removesuffix(".py")
    if part == "__init__" or path.relative_to(ROOT).as_posix() in COMPOSER:
        return
    if part == "training":
        allowed = {*LEVEL, "config"}
    else:
        allowed = {name for name, level in LEVEL.items() if level <= LEVEL[part]}
    assert imported(path) <= allowed


def test_the_test_sees_imports() -> None:
    assert {"models", "diffusion", "config"} <= imported(ROOT / "stdit" / "training" / "build.py")
