"""What the quickstart's model learns from 60 clips: the commands of stdit/lora/README.md.

    QUICKSTART=outputs/quickstart pytest -m slow tests/test_teach_shapes.py

needs a run of scripts/quickstart.sh, and half an hour.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stdit.data.shapes.build import ShapesConfig, build

ROOT = Path(__file__).parents[1]
SOURCES = ["{manifest: data/diagonal/manifest.csv, weight: 0.0625}"]
SOURCES += ["{manifest: data/known/manifest.csv, weight: 0.03}"]
MOTION = "--name diagonal --lora.targets temporal --optimizer.lr 1.2e-2 --data.sources".split()
MOTION += [f"[{', '.join(SOURCES)}]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the quickstart's run, and the clips that it was trained on."""
    if "QUICKSTART" not in os.environ:
        pytest.skip("QUICKSTART does not name a run of the quickstart")
    folder = tmp_path_factory.mktemp("teach")
    shutil.copytree(os.environ["QUICKSTART"], folder / "outputs" / "quickstart")
    build(folder / "data" / "known", ShapesConfig(num_clips=2000))
    return folder


def call(folder: Path, *command: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *command], cwd=folder, env=environment, check=True)


def scores(folder: Path, world: str, *flags: str) -> dict[str, dict[str, float]]:
    """Return the scores on prompts of the new value, and on those of the quickstart ("known")."""
    found = {}
    for name in (world, "known"):
        command = ["--checkpoint", "outputs/quickstart", "--world", world, *flags]
        command += ["--prompts", f"data/{name}/prompts_heldout.csv", "--output", "scores.json"]
        call(folder, str(ROOT / "scripts" / "evaluate_adherence.py"), *command)
        found[name] = json.loads((folder / "scores.json").read_text())["scores"]["heldout"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("world", "flags"), [("ring", ["--name", "ring"]), ("diagonal", MOTION)])
def test_an_adapter_teaches_something_new_and_keeps_the_rest(
    world: str, flags: list[str], folder: Path
) -> None:
    build(folder / "data" / world, ShapesConfig.of(world))
    before = scores(folder, world)
    call(folder, str(ROOT / "train.py"), "--config", str(ROOT / "configs/train/lora-shapes.yaml"), *flags)
    after = scores(folder, world, "--lora", f"outputs/{world}/lora")
    assert before[world]["lenient"] < 0.1 and after[world]["lenient"] >= 0.9
    for score in ("lenient", "shape_lenient", "colour", "motion"):
        assert after["known"][score] >= before["known"][score] - 0.02, score
