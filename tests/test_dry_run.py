"""`train.py --dry_run` on several processes, and of a run that exists; of a new one on one: test_train.py."""

from pathlib import Path

from tests import warm
from tests.launch import launch
from tests.training.tiny import tiny_settings


def test_steps_are_measured_on_all_processes(tmp_path: Path) -> None:
    flags = ["--dry_run", "steps", "--parallel.sp", "2"]
    code, output, errors = launch("train.py", 2, [*tiny_settings(tmp_path), *flags])
    assert code == 0, errors
    assert output.count("time on 2 processes: ") == 1 and output.count(" s a step, so ") == 1
    assert "sharing of 4x8x8" in output, "as several processes share it"
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["tiny.clips.csv"]


def test_what_differs_from_the_checkpoint_is_told(tmp_path: Path) -> None:
    def command(*flags: str) -> str:
        result = warm.run(["train.py", *tiny_settings(tmp_path), *flags])
        assert result.returncode == 0, result.stderr
        return result.stdout

    dry, slower = ("--dry_run", "true"), ("--optimizer.lr", "5e-4")
    assert "the run would" not in command(*dry)
    command("--trainer.steps", "2")
    checkpoint = tmp_path / "outputs" / "tiny" / "checkpoints" / "step-00000002"
    before = {path: path.read_bytes() for path in checkpoint.parent.rglob("*") if path.is_file()}
    assert f"the run would be resumed from step 2 ({checkpoint})\n" in command(*dry)
    assert f"the run would be resumed from step 2 ({checkpoint}), with optimizer.lr 0.001 -> 0.0005\n" in (
        command(*dry, *slower, "--resume_changed")
    )
    said = "the run would not start: checkpoint "
    assert f"{said}{checkpoint} is of another experiment: optimizer.lr 0.001 -> 0.0005. Add" in command(
        *dry, *slower
    )
    assert f"{said}{checkpoint} cannot be resumed with model.depth 1 -> 2 (" in command(
        *dry, "--model.depth", "2"
    )
    assert "the run would not start: init_from = absent: " in command(
        *dry, "--name", "new", "--init_from", "absent"
    )
    assert before == {path: path.read_bytes() for path in checkpoint.parent.rglob("*") if path.is_file()}


def test_measured_steps_warn_of_nothing_that_the_run_does_not(tmp_path: Path) -> None:
    flags = ["--validation.prompts", "[a]", "--validation.every", "3", "--validation.loss_every", "1"]
    flags += ["--checkpoint.keep_best", "1", "--optimizer.final_share", "0.5"]
    flags += ["--data.cache", "disk", "--data.cache_dir", str(tmp_path / "cache"), "--dry_run", "steps"]
    result = warm.run(["train.py", *tiny_settings(tmp_path), *flags])
    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines() == [
        "optimizer.final_share = 0.5 has no effect: it is for optimizer.schedule = cosine or linear"
    ]
