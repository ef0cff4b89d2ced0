"""The layering of the code: no circle of imports, packages in layers; and one public name has one meaning."""

import ast
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAYERS = [
    "errors registry lazy umask atomic_files hashing checkpoint_files suggestions cli setting_checks named_configs"
    " settings in_diffusers",
    "parallel",
    "models",
    "lora",
    "diffusion",
    "codecs",
    "data",
    "pipelines",
    "evaluation",
    "training",
    "serve",
    "commands",
]
"""From the ground up: a file imports only from its own layer and those below it."""
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names.split()}
IN_EVERY_FILE = {"logger", "main"}
"""Public names that many modules define, each for itself."""
SCOPES = ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
"""Expressions whose names are their own."""
FILES = sorted((ROOT / "stdit").rglob("*.py"))


def module_name(path: Path) -> str:
    """``stdit/data/plan.py`` -> ``stdit.data.plan``; a package has the name of its folder."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in FILES}


def imports(path: Path) -> set[str]:
    """Modules of stdit that a file imports, anywhere in it: also in functions, and for type checkers alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in submodules}
    return {name for name in found if name in MODULES}


def package(module: str) -> str:
    """The folder of a file; a package's face belongs to none, since it only hands names on."""
    return module.rpartition(".")[0]


def circle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """One circle of a graph of imports; empty if it has none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def is_face(module: str) -> bool:
    return MODULES[module].name == "__init__.py"


def defined_names(node: ast.AST) -> Iterator[str]:
    """Names that a module defines at its top level, also in branches; what it imports is defined elsewhere."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield child.name
        elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            yield child.id
        elif not isinstance(child, SCOPES):
            yield from defined_names(child)


def repeated_names(modules: Mapping[str, Path]) -> dict[str, list[str]]:
    """Public names at the top level of more than one module, with these modules."""
    found: dict[str, list[str]] = {}
    for module, path in modules.items():
        for name in set(defined_names(ast.parse(path.read_text(encoding="utf-8")))):
            if not name.startswith("_") and name not in IN_EVERY_FILE:
                found.setdefault(name, []).append(module)
    return {name: places for name, places in found.items() if len(places) > 1}


def test_no_circle_of_files() -> None:
    graph = {name: imports(path) for name, path in MODULES.items()}
    assert circle(graph) == []


def test_no_circle_of_packages() -> None:
    graph: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        if not is_face(name):
            others = {package(other) for other in imports(path) if not is_face(other)}
            graph.setdefault(package(name), set()).update(others - {package(name), "stdit"})
    assert circle(graph) == []


def test_imports_point_down() -> None:
    level = {name: LEVEL[name.split(".")[1]] for name in MODULES if name != "stdit"}
    offenders = [
        f"{name} imports {other}, of a layer above it"
        for name in level
        for other in sorted(imports(MODULES[name]) & level.keys())
        if level[other] > level[name]
    ]
    assert not offenders, "\n".join(offenders)


def test_a_circle_is_seen() -> None:
    assert set(circle({"a": ["b"], "b": ["c"], "c": ["a"], "d": ["a"]})) == {"a", "b", "c"}


def test_imports_in_functions_and_for_type_checkers_are_seen(tmp_path: Path) -> None:
    file = tmp_path / "file.py"
    file.write_text(
        "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from stdit.codecs.base import VideoCodec\n\n\n"
        "def load() -> None:\n    from stdit.data import plan\n"
    )
    assert imports(file) == {"stdit.codecs.base", "stdit.data.plan"}


def test_public_names_have_one_meaning() -> None:
    assert repeated_names(MODULES) == {}


def test_a_name_with_two_meanings_is_seen(tmp_path: Path) -> None:
    first, second, third = (tmp_path / f"{name}.py" for name in ("first", "second", "third"))
    first.write_text(
        "import logging\nlogger = logging.getLogger()\nLIMIT: int = 3\n_own = 1\nall(one for one in ())\n"
        "try:\n    import av\nexcept ImportError:\n    class Missing:\n        size = 2\n"
        "def load():\n    local = 1\n"
    )
    second.write_text(
        "logger = None\nLIMIT, _own = 4, 2\nload = print\nlocal = size = sum(one for one in ())\n"
        "class Missing:\n    size = 1\n"
    )
    third.write_text("from second import LIMIT, load, local\n")
    modules = {path.stem: path for path in (first, second, third)}
    assert repeated_names(modules) == {name: ["first", "second"] for name in ("LIMIT", "Missing", "load")}
