"""Saving and finding the state of a run. What makes a folder whole is in `stdit.checkpoint_files`."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stdit.checkpoint_files import META, newest_whole, publish, read_meta, step_of, verify, write_manifest
from stdit.errors import UserError

NEEDED = {"step": int, "experiment": dict, "nonfinite_in_a_row": int}
"""What a run takes from the manifest of the checkpoint that it goes on from."""


@dataclass
class CheckpointConfig:
    """When the state of the run is saved, and for how long."""

    every: int = 1000
    """Steps between checkpoints; one is saved at the end, too."""
    keep_last: int = 2
    """So many of the newest checkpoints stay."""
    keep_every: int | None = None
    """Checkpoints at multiples of this step stay as well."""

    def __post_init__(self) -> None:
        for name in ("every", "keep_last", "keep_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"checkpoint.{name} = {value}: must be at least 1")


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


class Checkpoints:
    """The ``checkpoints`` folder of a run."""

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        """Make the folder, and remove what an interrupted save left."""
        self.folder, self.config = folder, config
        folder.mkdir(parents=True, exist_ok=True)
        for aside in folder.glob("step-*.tmp"):
            shutil.rmtree(aside)

    def save(self, step: int, write: Callable[[Path], None], meta: dict[str, Any]) -> Path:
        """Save the state after ``step`` steps, under its final name only when all of it is on the disk.

        Args:
            write: writes files into the folder that it is given.
            meta: what ``meta.json`` holds beside sizes and hashes.

        Raises:
            UserError: if the disk refuses; nothing is left of the attempt, older checkpoints are as before.
        """
        folder = self.folder / f"step-{step:08d}"
        if folder.exists():
            try:
                verify(folder)
                return folder
            except UserError:
                folder.rename(_free(folder.with_name(f"{folder.name}.broken")))
        aside = folder.with_name(f"{folder.name}.tmp")
        with written(f"checkpoint {folder}", aside):
            aside.mkdir()
            write(aside)
            write_manifest(aside, {"step": step, **meta})
            publish(aside, folder)
        self._prune()
        return folder

    def _prune(self) -> None:
        folders = sorted(self.folder.glob("step-*"), key=lambda path: step_of(path) or -1)
        folders = [path for path in folders if step_of(path) is not None]
        for path in folders[: -self.config.keep_last]:
            if self.config.keep_every is None or (step_of(path) or 0) % self.config.keep_every:
                aside = path.rename(path.with_name(f"{path.name}.tmp"))  # never seen half removed
                shutil.rmtree(aside)


@contextmanager
def written(what: str, aside: Path) -> Iterator[None]:
    """Turn what a disk refuses while it lasts into a UserError, and leave nothing of the folder ``aside``."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{what} could not be written ({error}); what was there before is as it was. Make room on the "
            "disk and run the same command again."
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)  # which has its name by now, if all went well


@contextmanager
def replaced(what: str, folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the name ``folder`` when it is whole; an older one of that name goes."""
    aside, old = (folder.with_name(f"{folder.name}.{suffix}") for suffix in ("tmp", "old"))
    for leftover in (aside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    with written(what, aside):
        aside.mkdir(parents=True)
        yield aside
        if folder.exists():
            folder.rename(old)
        aside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _free(path: Path) -> Path:
    """``path``, or with the first number that makes it new."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free
