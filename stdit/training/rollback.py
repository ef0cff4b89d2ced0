"""Roll a run back to a checkpoint before the batches that a loss spike excludes."""

import shutil
from pathlib import Path
from typing import Any

from stdit.checkpoint_files import is_whole, step_folders
from stdit.training.recorder import Recorder
from stdit.training.saver import Saver


class Rollback:
    """Roll a run back after a spike with ``trainer.spike.exclude_batches`` above 1, on all ranks."""

    step: int | None = None
    """The step to train from after a rollback; None if there was none since this was last reset."""

    def __init__(self, saver: Saver, recorder: Recorder) -> None:
        self.saver, self.recorder, self.mesh = saver, recorder, saver.mesh

    def after_spike(self, values: dict[str, Any], step: int) -> bool:
        """Load the checkpoint before the excluded batches, if they were trained on, and set `step`.

        If there is no checkpoint that early, or it is from before the last change of the run, only the batch of
        ``step`` is excluded, whose update was not applied.
        Every rank must call this.

        Args:
            values: measurements of the step.

        Returns:
            whether the run was rolled back.
        """
        excluded = self.saver.config.trainer.spike.exclude_batches
        if "spike" not in values or excluded == 1:
            return False
        checkpoints = self.saver.checkpoints
        checkpoints.wait()
        checkpoint = self.mesh.on_main(
            lambda: _newest_before(checkpoints.folder, self.saver.changed_step, step - excluded + 1)
        )
        if checkpoint is None:
            return False
        self.step = self.mesh.on_all_ranks(lambda: self.saver.load(checkpoint))
        self.recorder.rewind(self.step)
        print(f"step {step}: the loss jumped to {values['spike']:.4g}; rolled back to {checkpoint}")
        return True


def _newest_before(checkpoints: Path, first: int, batch: int) -> Path | None:
    """Return the newest complete checkpoint before a batch, but from step ``first`` on; remove later ones, trained on
    excluded batches."""
    folders = step_folders(checkpoints)
    for step, path in folders.items():
        if first <= step <= batch and is_whole(path):
            for late in (folder for at, folder in folders.items() if at > batch):
                shutil.rmtree(late.rename(late.with_name(f"{late.name}.tmp")))
            return path
    return None
