"""Find the checkpoint to resume from."""

from pathlib import Path

from stdit.checkpoint_files import newest_whole, step_folders, step_of, verify
from stdit.errors import UserError


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
    others = step_folders(checkpoints).items()
    newer = [path.name for at, path in others if at >= step and path.resolve() != chosen.resolve()]
    if newer:
        raise UserError(
            f"resume = {resume}, but {checkpoints} has {newer[0]} already: move that away, or "
            "choose another name."
        )
    return chosen, []
