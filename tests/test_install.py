"""Install commands that pages and messages name work in a clone, and from any folder."""

import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from stdit import errors
from stdit.errors import install_command

ROOT = Path(__file__).parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
    "optional-dependencies"
]
TEXTS = [
    path
    for pattern in ("*.md", ".github/**/*.md", "configs/**/*", "scripts/**/*", "stdit/**/*")
    for path in ROOT.glob(pattern)
    if path.suffix in (".md", ".py", ".sh", ".yaml", ".sbatch")
]


def test_pages_and_messages_name_extras_of_the_clone() -> None:
    """`pip install 'stdit[prepare]'` finds nothing: stdit is on no package index."""
    found = []
    for path in TEXTS:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"pip install\S* (-\S+ )*['\"]?stdit", text), path
        named = re.findall(r"-e '?\.\[([\w,]+)\]|install_command\('(\w+)'\)", text)
        found += [extra for names in named for part in names if part for extra in part.split(",")]
    assert {"prepare", "parquet", "ocr", "plot"} <= set(found) <= set(EXTRAS)


def test_the_front_page_has_plain_lines_for_a_clone() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    commands = [line.partition("#")[0].strip() for line in lines if line.startswith("pip install")]
    assert commands == ["pip install -e .", "pip install -e '.[serve]'", "pip install -e '.[prepare]'"]


def test_the_command_names_the_clone_from_any_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    assert install_command("prepare") == "pip install -e '.[prepare]'"
    monkeypatch.chdir(tmp_path)
    *_, target = shlex.split(install_command("prepare"))
    assert target == f"{ROOT}[prepare]" and (Path(target.partition("[")[0]) / "pyproject.toml").is_file()


def test_without_a_clone_the_command_names_the_packages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "stdit" / "errors.py"))
    metadata = ["torch>=2.11", 'pyarrow>=16; extra == "parquet"', 'imagehash>=4.3; extra == "prepare"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: metadata)
    assert shlex.split(install_command("parquet")) == ["pip", "install", "pyarrow>=16"]


def test_a_step_without_its_package_says_how_to_install_it(tmp_path: Path) -> None:
    """As a user runs it: the line can be copied from any folder."""
    (tmp_path / "clips.csv").write_text("path,text,num_frames,fps,height,width\na.mp4,a,8,8,8,8\n")
    (tmp_path / "a.mp4").write_bytes(b"")
    (tmp_path / "imagehash.py").write_text("raise ImportError('no module')")
    result = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), "dedupe", "clips.csv", "out.csv"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert f"pip install -e '{ROOT}[prepare]'" in result.stderr, result.stderr
