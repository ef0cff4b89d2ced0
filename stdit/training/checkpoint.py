"""Saving and finding the state of a run. What makes a folder whole is in `stdit.checkpoint_files`."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stdit.checkpoint_files import META, apply_umask, newest_whole, read_meta, step_of, verify
from stdit.errors import UserError

NEEDED = {"step": int, "experiment": dict, "nonfinite_in_a_row": int, "parts": int}
"""What a run takes from the manifest of the checkpoint that it goes on from."""


def find_checkpoint(resume: str, checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from (None: start anew), and why newer ones were passed over.

    Args:
        resume: ``auto``: the newest whole one; ``never``: none; else the path of one.
        checkpoints: where the run keeps its own.

    Raises:
        UserError: if checkpoints are there but must not be used, or none of them can be.
    """
    run = checkpoints.parent
    if checkpoints.exists() and not checkpoints.is_dir():
        raise UserError(
            f"{checkpoints} is a file, in the place of a folder: move it away, or choose another name."
        )
    newest, passed_over = newest_whole(checkpoints)
    if resume == "auto":
        if newest is None and passed_over:
            raise UserError(
                f"{run} has checkpoints, but none is whole: {passed_over[0]} To start anew, move {run} away "
                "or choose another name."
            )
        return newest, passed_over
    if resume == "never":
        if newest is not None or passed_over:
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
    """The manifest of a checkpoint that this experiment may go on from.

    Keys that only one of the experiments has are not compared: some are known only once the parts are built.

    Raises:
        UserError: naming what differs, or what the manifest lacks.
    """
    meta = read_meta(checkpoint)
    for key, kind in NEEDED.items():
        if not isinstance(meta.get(key), kind):
            raise UserError(
                f"checkpoint {checkpoint}: {META} has no {key} that can be read: use another checkpoint, or delete "
                "this folder to go on from the one before it."
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


def way_out(error: Exception) -> str:
    """What to do about a disk that refuses."""
    codes = (errno.ENOENT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)
    if isinstance(error, OSError) and error.errno in codes:
        return "see that the folder is there and may be written"
    return "make room on the disk"


@contextmanager
def written(what: str, aside: Path) -> Iterator[None]:
    """Turn what a disk refuses while it lasts into a UserError; after any error nothing is left of ``aside``."""
    from safetensors import SafetensorError

    try:
        yield
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise UserError(
                f"{what} could not be written ({error}); what was there before is as it was: {way_out(error)} and "
                "run the same command again."
            ) from error
        raise


@contextmanager
def replaced(what: str, folder: Path, parents: bool = False) -> Iterator[Path]:
    """A folder to write into, which takes the name ``folder`` when it is whole; an older one of that name goes.

    Args:
        parents: make those that are not there. Not in the folder of a run: one that vanished is not to come back
            without the rest.
    """
    aside, old = (folder.with_name(f"{folder.name}.{suffix}") for suffix in ("tmp", "old"))
    for leftover in (aside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    with written(what, aside):
        aside.mkdir(parents=parents)
        yield aside
        apply_umask(aside)
        if folder.exists():
            folder.rename(old)
        aside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
