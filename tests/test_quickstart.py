"""scripts/quickstart.sh, with a stand-in for Python that writes the files of each command."""

import re
import subprocess
from pathlib import Path

import pytest

from stdit.data.shapes.worlds import WORLDS, split_combinations
from stdit.pipelines.config import SampleConfig
from stdit.settings import parse

ROOT = Path(__file__).parents[1]
STAND_IN = """#!/usr/bin/env bash
run=outputs/quickstart
sleep 0.02  # times of files are exact to some milliseconds
[ "$1" != "$(cat stop 2>/dev/null)" ] || exit "$(cat code)"
case "$1" in
    train.py) mkdir -p $run/pipeline; [ -e $run/pipeline/model_index.json ] || touch $run/pipeline/model_index.json ;;
    sample.py)
        [[ $* == *bundled* ]] && run=outputs/bundled && mkdir -p $run
        mkdir $run/videos && touch $run/videos/sheet.png ;;
    scripts/evaluate_adherence.py) touch $run/scores.json ;;
    scripts/contact_sheet.py) touch "${@: -1}" ;;
esac
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkout that holds the script, the stand-in, and a model that comes with it."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "quickstart.sh").write_bytes((ROOT / "scripts" / "quickstart.sh").read_bytes())
    (tmp_path / "scripts" / "environment.sh").write_text('PATH="$PWD/bin:$PATH"\n')
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(STAND_IN)
    (tmp_path / "bin" / "python").chmod(0o755)
    (tmp_path / "stdit" / "bundled").mkdir(parents=True)
    (tmp_path / "stdit" / "bundled" / "meta.json").touch()
    return tmp_path


def start(folder: Path, stop: str = "", code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the script. Command ``stop`` exits with ``code``."""
    (folder / "stop").write_text(stop)
    (folder / "code").write_text(str(code))
    return subprocess.run(["bash", "scripts/quickstart.sh"], cwd=folder, capture_output=True, text=True)


def quickstart(folder: Path, stop: str = "", code: int = 0) -> tuple[int, list[str]]:
    """Run the script; returns its exit code and the commands that it showed."""
    done = start(folder, stop, code)
    return done.returncode, re.findall(r"^\$ (.*)$", done.stdout, re.MULTILINE)


def commands_of_the_readme() -> list[str]:
    blocks = (ROOT / "README.md").read_text(encoding="utf-8").split("```bash\n")[1:]
    (commands,) = (block for block in blocks if "scripts/make_shapes.py" in block)
    return commands.partition("\n```")[0].splitlines()


def test_the_commands_are_those_of_the_readme_and_their_results_are_reused(folder: Path) -> None:
    bundled, shapes, train, sample, score, sheets = commands = commands_of_the_readme()
    assert quickstart(folder) == (0, commands)
    assert quickstart(folder) == (0, [shapes, train])
    (folder / "outputs" / "quickstart" / "scores.json").unlink()
    assert quickstart(folder) == (0, [shapes, train, score])
    (folder / "outputs" / "quickstart" / "pipeline" / "model_index.json").touch()  # trained again
    assert quickstart(folder) == (0, [shapes, train, sample, score, sheets])
    (folder / "stdit" / "bundled" / "meta.json").touch()  # another model came with a newer commit
    assert quickstart(folder) == (0, [bundled, shapes, train, sheets])


def test_the_first_videos_are_there_before_the_training(folder: Path) -> None:
    done = start(folder, "train.py", 130)
    videos = "outputs/bundled/videos/*.mp4"
    assert done.returncode == 130 and done.stdout.index(videos) < done.stdout.index("$ python train.py")
    assert (folder / "outputs" / "bundled" / "videos" / "sheet.png").exists()
    assert "outputs/quickstart/sheets.png\n" in start(folder).stdout


def test_the_first_prompts_ask_for_what_was_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = parse(SampleConfig, ["--config", "configs/sample/bundled.yaml"])
    assert config.checkpoint is None and config.output == "outputs/bundled/videos"
    assert config.batch_size == 1 < len(config.prompt), "the first one is there at once"
    world = WORLDS["64"]
    held_out = [combo for pairs in (False, True) for combo in split_combinations(0, world, pairs)[1]]
    acts = {"orbits": "orbits", "bounces": "bounce", "turns": "turn", "follows": "follows"}
    for prompt in config.prompt:
        words = [acts.get(word, word) for word in prompt.partition(" on a ")[0].split()]
        colour, shape, act, *other = (
            w for w in words if w in (*world.colours, *world.shapes, *acts.values())
        )
        assert (shape, colour, act, *reversed(other)) in held_out, prompt


@pytest.mark.parametrize("code", [2, 130])
def test_errors_of_the_first_videos_are_not_hidden(folder: Path, code: int) -> None:
    half = folder / "outputs" / "bundled" / "videos" / "000-half.mp4"
    half.parent.mkdir(parents=True)
    half.touch()
    bundled, *others = commands_of_the_readme()
    assert quickstart(folder, "sample.py", code) == (code, [bundled])
    assert quickstart(folder) == (0, [bundled, *others])
    assert not half.exists()


def test_it_opens_nothing(folder: Path) -> None:
    for viewer in ("open", "xdg-open", "display", "eog", "start"):
        (folder / "bin" / viewer).write_text("#!/bin/sh\ntouch opened\n")
        (folder / "bin" / viewer).chmod(0o755)
    assert start(folder).returncode == 0 and not (folder / "opened").exists()


@pytest.mark.parametrize(("code", "own"), [(0, 143), (130, 130), (2, 2)])
def test_it_stops_where_training_stopped(folder: Path, code: int, own: int) -> None:
    assert quickstart(folder, "train.py", code) == (own, commands_of_the_readme()[:3])


def test_an_interrupted_sampling_starts_over(folder: Path) -> None:
    assert quickstart(folder, "train.py", 130)[0] == 130  # the videos of the other model are finished
    half = folder / "outputs" / "quickstart" / "videos" / "000-half.mp4"
    assert quickstart(folder, "sample.py", 130)[0] == 130
    half.parent.mkdir()
    half.touch()
    assert quickstart(folder)[0] == 0
    assert not half.exists()
