"""Chaos: training keeps its promises under a few faults, and a program that breaks one is noticed."""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.chaos.faults import delete, flip, truncate
from scripts.chaos.jobs import CommandLauncher, Split, parse_split
from scripts.chaos.log import Attempt, Verdict, read_log, table
from scripts.chaos.runs import Result, compare
from stdit.checkpoint_files import verify, write_manifest
from stdit.errors import UserError
from tests.launch import ROOT
from tests.training.tiny import tiny_settings

FAKE = f"{{python}} {Path(__file__).parent / 'fake_train.py'}"


def chaos(*argv: str, limit: float = 400) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/chaos/chaos.py", *argv]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)


@pytest.mark.slow
def test_training_keeps_its_promises(tmp_path: Path) -> None:
    settings = [*tiny_settings(tmp_path), "--trainer.steps", "24", "--checkpoint.keep_last", "3"]
    own = ["--faults", "3", "--seed", "2", "--splits", "1x1", "2x1", "--output", str(tmp_path / "chaos")]
    kinds = ["--only", "kill_saving", "kill_rank", "flip"]
    done = chaos(*own, *kinds, *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every promise was kept" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "chaos" / "chaos.jsonl").read_text().splitlines()]
    assert sum(line.get("fault", "none") != "none" and not line["missed"] for line in lines[1:]) == 3
    again = chaos(*own, *kinds, *settings)
    assert again.returncode == 0 and "undisturbed to the end" not in again.stdout, "all trials were recorded"


@pytest.mark.slow
def test_training_keeps_its_promises_under_other_launchers(tmp_path: Path) -> None:
    own = ["--faults", "4", "--launcher", "torchrun", "--splits", "1x1", "1x2"]
    done = chaos(*own, "--output", str(tmp_path / "chaos"), "--trainer.steps", "40", limit=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "drop_link: skipped: only the warm launcher" in done.stdout


@pytest.mark.slow
def test_the_default_is_a_tiny_run_of_its_own(tmp_path: Path) -> None:
    done = chaos("--faults", "20", "--seed", "3", "--output", str(tmp_path / "chaos"), limit=900)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "broken, faults, number, message",
    [
        ("", "kill kill_saving truncate flip delete pause sigterm", 7, "every promise was kept"),
        ("drift", "kill", 1, "undisturbed 0."),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("from step 0", "kill", 1, "lost more than the steps after the checkpoint"),
                ("orphan", "kill_rank", 1, "processes were left behind"),
                ("not aside", "kill", 4, "is broken, but has its final name"),
                ("silent", "delete", 1, "not reported as skipped"),
                ("no save", "sigterm", 1, "steps were done, but the newest checkpoint"),
                ("deaf", "sigterm", 1, "had not ended after"),
            )
        ),
    ],
)
def test_a_broken_promise_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, faults: str, number: int, message: str
) -> None:
    monkeypatch.setenv("BROKEN", broken)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    own = ["--launcher", FAKE, "--splits", "1x1", "--faults", str(number), "--only", *faults.split()]
    config = ["--config", "configs/train/quickstart.yaml", "--trainer.steps", "30"]
    done = chaos(*own, "--seed", "1", "--limit", "8", "--output", str(tmp_path), *config)
    log = (tmp_path / "chaos.jsonl").read_text() + done.stdout + done.stderr
    assert done.returncode == bool(broken) and message in done.stdout, log
    lines = [json.loads(line) for line in (tmp_path / "chaos.jsonl").read_text().splitlines()]
    assert any(line.get("fault", "none") != "none" and not line["missed"] for line in lines[1:]), log


def test_bad_splits_and_launchers_are_errors(tmp_path: Path) -> None:
    for text in ("2", "2x", "0x1", "2x1:", "2x1:half", "ax1"):
        with pytest.raises(UserError, match="--splits"):
            parse_split(text)
    assert parse_split("2x3:sharded") == Split(2, (3,), sharded=True)
    grid = parse_split("1x2x2")
    assert grid.ranks == 4 and grid.flags[:2] == ["--parallel.grid", "[2, 2]"] and str(grid) == "1x2x2"
    for command in ("python {rank}", "python '", "python {0}"):
        with pytest.raises(UserError, match="--launcher"):
            CommandLauncher(command)


@pytest.mark.parametrize("damage", [truncate, flip, delete])
def test_a_damaged_checkpoint_fails_verification(
    tmp_path: Path, damage: Callable[[Path, random.Random], str]
) -> None:
    for seed in range(64):
        folder = tmp_path / str(seed)
        folder.mkdir()
        (folder / "weights").write_bytes(bytes(range(100)))
        write_manifest(folder, {})
        assert damage(folder, random.Random(seed))
        with pytest.raises(UserError):
            verify(folder)


def test_runs_are_compared() -> None:
    numpy = pytest.importorskip("numpy")

    def result(loss: float = 1.0, weight: float = 1.0, steps: int = 2) -> Result:
        curve = [{"step": step, "loss": loss, "lr": 1.0, "grad_norm": 1.0} for step in range(steps)]
        return Result(curve, {"weight": numpy.array([weight, 1.0])})

    assert not list(compare(result(), result(), 0))
    assert not list(compare(result(loss=1 + 1e-6, weight=1 + 1e-6), result(), 1e-5))
    for other, tolerance, message in (
        (result(loss=1 + 1e-15), 0, "loss of step 0"),
        (result(loss=1 + 1e-4), 1e-5, "loss of step 0"),
        (result(weight=1 + 1e-15), 0, "final weights differ"),
        (result(weight=1 + 1e-4), 1e-5, "final weights differ"),
        (result(steps=3), 1e-5, "has 3 lines, of the steps 0-2, not 0-1"),
    ):
        assert message in next(compare(other, result(), tolerance))


def test_a_log_is_continued_after_its_last_complete_trial(tmp_path: Path) -> None:
    log = tmp_path / "chaos.jsonl"
    assert read_log(log, {"seed": 1}) == ([], [])
    attempt, verdict = Attempt(0, "2x1", "kill", saving=True, seconds=1.5), Verdict(0, ["2x1"], 0.0, 0.0)
    with log.open("a") as file:
        for line in (attempt, verdict, Attempt(1, "1x1")):
            file.write(json.dumps(line.__dict__) + "\n")
    assert read_log(log, {"seed": 1}) == ([attempt], [verdict])
    assert len(log.read_text().splitlines()) == 3
    with pytest.raises(UserError, match="log of other settings"):
        read_log(log, {"seed": 2})
    assert "kill                1        0        1        0        1      1.5        0" in table(
        [attempt], [verdict]
    )
