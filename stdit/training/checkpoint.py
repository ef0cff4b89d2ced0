"""Find the checkpoint to resume from, and check that it belongs to the same experiment."""

from pathlib import Path
from typing import Any

from stdit.checkpoint_files import META, newest_whole, read_meta, step_of, verify
from stdit.errors import UserError

_REQUIRED = {"step": int, "experiment": dict, "nonfinite_in_a_row": int, "batch_splits": int}
"""Keys of the manifest that resuming reads, with their types."""


def find_checkpoint(resume: str, checkpoints: Path) -> tuple[Path | None, list[str]]:
    """Return the checkpoint to resume from (None: start at step 0), and why newer ones were skipped.

    Args:
        resume: ``auto``: the newest whole one; ``never``: none; otherwise the path of one.
        checkpoints: the folder of the run's own checkpoints.

    Raises:
        UserError: if there are checkpoints, but they must not be used or none of them is whole.
    """
    run = checkpoints.parent
    if checkpoints.exists() and not checkpoints.is_dir():
        raise UserError(
            f"{checkpoints} is a file, but must be a folder: move it away, or choose another name."
        )
    newest, skipped = newest_whole(checkpoints)
    if resume == "auto":
        if newest is None and skipped:
            raise UserError(
                f"{run} has checkpoints, but none is whole: {skipped[0]} To start again, move {run} away "
                "or choose another name."
            )
        return newest, skipped
    if resume == "never":
        if newest is not None or skipped:
            raise UserError(
                f"resume = never, but {run} has checkpoints: choose another name, or move {run} away."
            )
        return None, []
    chosen = Path(resume)
    verify(chosen)
    step = step_of(chosen) or 0
    newer = [
        p.name
        for p in checkpoints.glob("step-*")
        if p.resolve() != chosen.resolve() and (step_of(p) or -1) >= step
    ]
    if newer:
        raise UserError(
            f"resume = {resume}, but {checkpoints} has {sorted(newer)[-1]} already: move that away, or "
            "choose another name."
        )
    return chosen, []


def check_same_experiment(checkpoint: Path, experiment: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest of a checkpoint, if it is of this experiment.

    Keys that only one of the experiments has are not compared: some are known only when the components are built.

    Raises:
        UserError: naming the settings that differ, or the keys that the manifest lacks.
    """
    meta = read_meta(checkpoint)
    for key, kind in _REQUIRED.items():
        if not isinstance(meta.get(key), kind):
            raise UserError(
                f"checkpoint {checkpoint}: {META} has no valid {key}: use another checkpoint, or delete this folder "
                "to resume from the one before it."
            )
    saved = meta["experiment"]
    differing = [
        f"{key} was {saved[key]}, is {experiment[key]}"
        for key in experiment
        if key in saved and saved[key] != experiment[key]
    ]
    if differing:
        raise UserError(
            f"checkpoint {checkpoint} is of another experiment: {'; '.join(differing)}. Go back to its "
            f"settings, or choose another name (and start from its weights by --init_from {checkpoint})."
        )
    return meta
