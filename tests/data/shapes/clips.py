"""Scenes, files and words that the tests of the embedded data set share."""

import csv
import importlib
import io
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import av
import numpy as np
import pytest

from stdit import cli
from stdit.data.shapes.build import ShapesConfig, write_video
from stdit.data.shapes.captions import UNSEEN
from stdit.data.shapes.scenes import Scene
from stdit.data.shapes.worlds import WORLDS, World, sample_scene, split_combinations

SMALL, LARGE = WORLDS["32"], WORLDS["64"]
ONES = {world.name: sum(split_combinations(0, world), ()) for world in WORLDS.values()}
"""All combinations of one object."""
TWOS = sum(split_combinations(0, LARGE, pairs=True), ())
"""All combinations of two objects."""
BASE = Scene("circle", "red", "right", "black")
FEW = {"32": ShapesConfig(num_clips=4, seed=3), "64": ShapesConfig.of("64", num_clips=4, seed=3)}


def counts(few: int, many: int) -> pytest.MarkDecorator:
    """Run a test with few scenes, or videos, by default, and with many among the slow tests."""
    return pytest.mark.parametrize(
        "count", [pytest.param(few, id="few"), pytest.param(many, id="many", marks=pytest.mark.slow)]
    )


def run_script(name: str, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    """Run scripts/NAME.py in this process."""
    module, argv = importlib.import_module(f"scripts.{name}"), [name, *map(str, arguments)]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as output:
        patch.setattr(sys, "argv", argv)
        with redirect_stderr(io.StringIO()) as errors, pytest.raises(SystemExit) as end:
            cli.run(module.main)
    return subprocess.CompletedProcess(argv, int(end.value.code or 0), output.getvalue(), errors.getvalue())


def scenes(count: int, seed: int = 0, world: World = SMALL, pairs: bool = False) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, TWOS if pairs else ONES[world.name], world) for _ in range(count)]


def encoded(frames: np.ndarray, path: Path, crf: int = 12) -> np.ndarray:
    write_video(path, frames, fps=8, crf=crf)
    with av.open(path) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def unseen_names(text: str, scene: Scene) -> set[str]:
    """Return the attributes for which a text uses a held-out word, of the first object."""
    values = {name: scene.attributes[name] for name in UNSEEN if scene.attributes[name]}
    forms = {name: [f for o in UNSEEN[name][value] for f in _forms(o)] for name, value in values.items()}
    return {name for name in forms if any(re.search(rf"\b{form}\b", text) for form in forms[name])}


def _forms(option: str) -> list[str]:
    """Return both inflections of a verb phrase `third|participle rest`, or the phrase itself."""
    if "|" not in option:
        return [option]
    third, rest = option.split("|")
    return [rest, " ".join([third, *rest.split(" ")[1:]])]
