"""The list of fast tests names tests that exist, and has a group for each package."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINES = (ROOT / "tests" / "fast.txt").read_text(encoding="utf-8").splitlines()


def test_files_and_tests_of_the_list_exist() -> None:
    missing = []
    for line in LINES:
        file, _, test = line.partition("[")[0].partition("::")
        if line.startswith("#") or not line:
            continue
        path = ROOT / file
        names = (
            {node.name for node in ast.parse(path.read_text()).body if hasattr(node, "name")}
            if test
            else {""}
        )
        missing += [] if file.startswith("tests/") and path.exists() and test in names else [line]
    assert not missing, f"tests/fast.txt names what there is not: {missing}"


def test_each_package_has_a_group() -> None:
    groups = {word for line in LINES[1:] if line.startswith("#") for word in line[1:].split()}
    packages = {path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("stdit/**/__init__.py")}
    assert groups == packages
