"""The parity command: passes if the numbers agree, and fails if they do not."""

from pathlib import Path

import pytest

from tests.launch import launch
from tests.training.tiny import tiny_settings


@pytest.mark.parametrize(
    "ranks, split, sharded",
    [
        (4, ["--parallel.sp", "2"], "false"),
        (2, ["--parallel.sp", "2"], "true"),
        (4, ["--parallel.grid", "[2, 2]", "--model.blocks", "S J L T"], "false"),
    ],
)
def test_parity(tmp_path: Path, ranks: int, split: list[str], sharded: str) -> None:
    settings = [*tiny_settings(tmp_path), *split, "--parallel.shard_parameters", sharded]
    code, output, errors = launch("scripts/parity.py", ranks, settings)
    assert code == 0, output + errors
    assert output.count("the numbers are those of one process") == 1
    for what in ("output", "loss", "gradients", "weights after 5 steps", "averaged weights", "sample"):
        assert f"\n{what} " in f"\n{output}"


def test_a_difference_fails_and_is_named(tmp_path: Path) -> None:
    settings = [*tiny_settings(tmp_path), "--parallel.sp", "2"]
    code, output, _ = launch("scripts/parity.py", 2, [*settings, "--tolerance", "1e-30"])
    assert code == 1
    worst = next(line for line in output.splitlines() if line.startswith("gradients"))
    assert "ABOVE 1e-30" in worst and ".weight" in worst
    assert "NOT those of one process" in output
