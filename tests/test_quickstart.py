"""scripts/quickstart.sh, with a stand-in for Python that writes the files of each command."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAND_IN = """#!/usr/bin/env bash
run=outputs/quickstart
sleep 0.02  # times of files are exact to some milliseconds
[ "$1" != "$(cat stop 2>/dev/null)" ] || exit "$(cat code)"
case "$1" in
    train.py) mkdir -p $run/pipeline; [ -e $run/pipeline/model_index.json ] || touch $run/pipeline/model_index.json ;;
    sample.py) mkdir $run/videos && touch $run/videos/sheet.png ;;
    scripts/evaluate_adherence.py) touch $run/scores.json ;;
esac
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkout that holds the script and the stand-in."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "quickstart.sh").write_bytes((ROOT / "scripts" / "quickstart.sh").read_bytes())
    (tmp_path / "scripts" / "environment.sh").write_text('PATH="$PWD/bin:$PATH"\n')
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(STAND_IN)
    (tmp_path / "bin" / "python").chmod(0o755)
    return tmp_path


def quickstart(folder: Path, stop: str = "", code: int = 0) -> tuple[int, list[str]]:
    """Run the script; returns its exit code and the commands that it showed. Command ``stop`` exits with ``code``."""
    (folder / "stop").write_text(stop)
    (folder / "code").write_text(str(code))
    done = subprocess.run(["bash", "scripts/quickstart.sh"], cwd=folder, capture_output=True, text=True)
    return done.returncode, re.findall(r"^\$ (.*)$", done.stdout, re.MULTILINE)


def test_the_commands_are_those_of_the_readme_and_their_results_are_reused(folder: Path) -> None:
    block = (ROOT / "README.md").read_text().partition("The quickstart runs these commands:\n\n```bash\n")[2]
    shapes, train, sample, score = commands = block.partition("\n```")[0].splitlines()
    assert quickstart(folder) == (0, commands)
    assert quickstart(folder) == (0, [shapes, train])
    (folder / "outputs" / "quickstart" / "scores.json").unlink()
    assert quickstart(folder) == (0, [shapes, train, score])
    (folder / "outputs" / "quickstart" / "pipeline" / "model_index.json").touch()  # trained again
    assert quickstart(folder) == (0, commands)


@pytest.mark.parametrize(("code", "own"), [(0, 143), (130, 130), (2, 2)])
def test_it_stops_where_training_stopped(folder: Path, code: int, own: int) -> None:
    assert quickstart(folder, "train.py", code) == (own, quickstart(folder)[1][:2])


def test_an_interrupted_sampling_starts_over(folder: Path) -> None:
    half = folder / "outputs" / "quickstart" / "videos" / "000-half.mp4"
    assert quickstart(folder, "sample.py", 130)[0] == 130
    half.parent.mkdir()
    half.touch()
    assert quickstart(folder)[0] == 0
    assert not half.exists()
