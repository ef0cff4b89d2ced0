"""`train.py --dry_run` on several processes; on one: test_train.py."""

from pathlib import Path

from tests.launch import launch
from tests.training.tiny import tiny_settings


def test_steps_are_measured_on_all_processes(tmp_path: Path) -> None:
    flags = ["--dry_run", "steps", "--parallel.sp", "2"]
    code, output, errors = launch("train.py", 2, [*tiny_settings(tmp_path), *flags])
    assert code == 0, errors
    assert output.count("time on 2 processes: ") == 1 and output.count(" s a step, so ") == 1
    assert "sharing of 4x8x8" in output, "as several processes share it"
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["tiny.clips.csv"]
