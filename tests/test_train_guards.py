"""train.py when the loss jumps, and the measurements that monitor a run."""

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from stdit.checkpoint_files import read_meta
from stdit.data.batch import EncodedBatch
from stdit.pipelines.loading import find_checkpoint_source
from stdit.training.spikes import SpikeGuard
from stdit.training.trainer import Trainer
from tests.test_resume_changed import kill_in
from tests.test_train import Settings, do, metrics, numbers, same_state, settings  # noqa: F401

FLAGS = {
    "trainer__spike__factor": 3,
    "trainer__spike__window": 8,
    "trainer__spike__exclude_batches": 3,
    "checkpoint__every": 4,
}


def jump_at(monkeypatch: pytest.MonkeyPatch, at: int) -> list[int]:
    """Multiply the loss of a step by 100; return the steps that are computed."""
    original, seen = Trainer.accumulate, []

    def accumulate(self: Trainer, batch: EncodedBatch) -> tuple[Tensor, Tensor]:
        seen.append(batch.step)
        loss, levels = original(self, batch)
        return loss * (100 if batch.step == at else 1), levels

    monkeypatch.setattr(Trainer, "accumulate", accumulate)
    return seen


def test_a_run_rolls_back_before_a_spike_and_excludes_its_batches(
    settings: Settings,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        seen = jump_at(patch, 10)
        assert do(settings(name="spike", trainer__steps=12, **FLAGS)) == 0
    assert seen == [*range(11), 11], "8, 9 and 10 are computed once, and excluded afterwards"
    assert "step 10: the loss jumped to" in capsys.readouterr().out
    run, never = (tmp_path / "outputs" / name for name in ("spike", "never"))
    assert [line["step"] for line in metrics(run) if line.get("excluded")] == [8, 9, 10]
    assert read_meta(run / "checkpoints" / "step-00000012")["spikes"]["excluded_steps"] == [8, 9, 10]
    assert do(settings(name="spike", trainer__steps=14, **FLAGS)) == 0  # resumes
    with monkeypatch.context() as patch:
        patch.setattr(SpikeGuard, "excluded_steps", {8, 9, 10}, raising=False)
        patch.setattr(SpikeGuard, "__setattr__", keep_excluded_steps)
        assert do(settings(name="never", trainer__steps=14, **FLAGS)) == 0
    assert numbers(run) == numbers(never)
    assert same_state(*(folder / "checkpoints" / "step-00000014" for folder in (run, never)))


def keep_excluded_steps(self: SpikeGuard, name: str, value: Any) -> None:
    if name != "excluded_steps":
        object.__setattr__(self, name, value)


def test_validation_loss_and_block_norms_are_in_the_metrics(
    settings: Settings,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = {"validation__loss_every": 2, "validation__loss_clips": 3, "trainer__block_norms_every": 3}
    assert do(settings(name="straight", trainer__steps=5, **flags)) == 0
    assert "validation loss on 3 clips of the training data, since" in capsys.readouterr().out
    run = tmp_path / "outputs" / "straight"
    lines = metrics(run)
    assert [line["step"] + 1 for line in lines if "validation_loss" in line] == [2, 4, 5]
    assert [line["step"] for line in lines if "block_norms" in line] == [0, 3]
    found = lines[-1]["validation"]
    assert list(found) == ["4x8x8 at 8 fps"] and list(found["4x8x8 at 8 fps"]) == [
        "0.125",
        "0.375",
        "0.625",
        "0.875",
    ]
    losses = found["4x8x8 at 8 fps"].values()
    assert lines[-1]["validation_loss"] == pytest.approx(sum(losses) / 4, abs=1e-6)
    assert lines[-1]["validation_loss"] != lines[1]["validation_loss"]

    flags |= {"validation__loss_manifest": tmp_path / "clips" / "manifest.csv"}  # which is the same clips
    assert do(settings(name="resumed", trainer__steps=3, **flags)) == 0
    assert "validation loss on 3 clips of /" in capsys.readouterr().out
    assert do(settings(name="resumed", trainer__steps=5, **flags)) == 0
    resumed = {
        line["step"]: line.get("validation_loss") for line in metrics(tmp_path / "outputs" / "resumed")
    }
    assert {step: resumed[step] for step in (1, 3, 4)} == {
        line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line
    }


@pytest.mark.slow
def test_a_run_whose_validation_loss_does_not_fall_ends_at_the_same_step_after_a_kill(
    settings: Settings,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = {"validation__loss_every": 1, "validation__patience": 3, "validation__min_improvement": 0.99}
    flags |= {"trainer__steps": 9, "checkpoint__every": 2, "checkpoint__keep_last": 1}
    flags |= {"validation__prompts": "[a]", "validation__num_inference_steps": 1}
    runs = [tmp_path / "outputs" / name for name in ("straight", "killed")]
    assert do(settings(name="straight", **flags)) == 0
    said = capsys.readouterr().out
    assert (
        "stopped at step 4 of 9: the validation loss has not fallen by 0.99 of itself in validation.pat"
        in said
    )
    assert f"trained for 4 steps: {runs[0] / 'pipeline'} is written\nSample: python" in said
    assert (
        f"From the best step: python sample.py --checkpoint {runs[0]}/checkpoints/step-00000001 --pr" in said
    )
    with monkeypatch.context() as patch:
        kill_in(patch, 3)
        with pytest.raises(RuntimeError, match="killed"):
            do(settings(name="killed", **flags))
    assert do(settings(name="killed", **flags)) == 0
    assert do(settings(name="killed", **flags)) == 0, "nothing is left to train"
    assert numbers(runs[0]) == numbers(runs[1]) and len(numbers(runs[1])) == 4
    for run in runs:
        assert {path.name for path in (run / "checkpoints").glob("step-*")} == {
            "step-00000001",
            "step-00000004",
        }
        assert [path.name for path in (run / "samples").iterdir()] == ["step-00000004"]
        assert find_checkpoint_source(run).path == run / "pipeline"
    assert same_state(*(run / "checkpoints" / "step-00000004" for run in runs))
    capsys.readouterr()
    flags |= {"validation__patience": 5}
    assert do(settings(name="killed", **flags)) == 0
    assert "stopped at step 6 of 9" in capsys.readouterr().out
    flags |= {"validation__loss_levels": 2}  # another loss, which is not compared with the best before
    assert do(settings(name="killed", **flags)) == 0
    assert "trained for 9 steps" in capsys.readouterr().out
