"""train.py when the loss jumps, and the measurements that monitor a run."""

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from stdit.checkpoint_files import read_meta
from stdit.data.batch import EncodedBatch
from stdit.training.spikes import SpikeGuard
from stdit.training.trainer import Trainer
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
