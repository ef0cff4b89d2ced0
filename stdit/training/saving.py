"""Writing the state of a run, while it trains on if need be, and removing what is not to stay."""

import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from stdit.checkpoint_files import is_whole, publish, seal_files, step_of, write_manifest
from stdit.errors import UserError
from stdit.parallel.processes.mesh import Mesh
from stdit.parallel.processes.storage import SavePlan, StateChunks, StateDicts, TensorChunk, write_chunks
from stdit.training.checkpoint import written
from stdit.training.config import CheckpointConfig

LOSSES = "validation_loss.json"
PATIENCE = 60.0
"""Seconds that a run which ends in an error waits for the checkpoint that it is writing."""


class Checkpoints:
    """The ``checkpoints`` folder of a run. Every rank has one and calls it alike.

    A save is written aside, each rank its files, flushed, hashed, and then made visible by one rename. If it is
    asynchronous, what this rank writes is copied first, and a thread writes the copy, while the next steps change the
    state. The threads of the ranks talk in a group of their own.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, mesh: Mesh, timeout: float = 1800.0) -> None:
        """Make the folder, and remove what an interrupted save left.

        Args:
            timeout: seconds that the thread of a rank waits for those of the others.
        """
        self.folder, self.config, self.mesh, self.timeout = folder, config, mesh, timeout
        self.save_plan, self.copy = SavePlan(mesh), Copy()
        self.apart: Mesh | None = None
        self.writing: Writing | None = None
        self.seconds: dict[str, float] = {}
        """Of the save before: how long training stood still, and waited for an earlier one to be written."""
        self.losses = read_losses(folder / LOSSES)
        """Validation losses by step."""
        if mesh.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            for aside in folder.glob("step-*.tmp"):
                shutil.rmtree(aside)

    def save(
        self,
        step: int,
        state: StateDicts,
        meta: dict[str, Any],
        describe: Callable[[Path], object] = lambda folder: None,
        at_once: bool = False,
    ) -> Path:
        """Save the state after ``step`` steps, under its final name only when all of it is on the disk.

        Args:
            meta: what ``meta.json`` holds beside sizes and hashes.
            describe: writes more files into the folder that it is given, on the first rank.
            at_once: be done on return, as without ``checkpoint.asynchronous``; else `wait` tells.

        Raises:
            UserError: on every rank, if the disk refuses, in this save or in the one before; nothing is left of the
                attempt, older checkpoints are as before.
        """
        begin = time.perf_counter()
        self.wait()
        waited = time.perf_counter() - begin
        folder = self.folder / f"step-{step:08d}"
        aside = folder.with_name(f"{folder.name}.tmp")
        with written(f"checkpoint {folder}", aside):
            if self.mesh.on_main(lambda: _is_there(folder)):
                return folder
            self.mesh.on_main(lambda: _begin(aside, describe))
        pieces = self.save_plan.chunks(state)
        meta = {"step": step, **meta}
        if at_once or not self.config.asynchronous:
            self._write(self.mesh, folder, aside, pieces, meta)
        else:
            copied, apart = self.copy.of(pieces), self._apart()
            self.writing = Writing(lambda: self._write(apart, folder, aside, copied, meta))
        seconds = {"checkpoint_seconds": time.perf_counter() - begin, "checkpoint_wait_seconds": waited}
        self.seconds = {name: round(value, 4) for name, value in seconds.items()}
        return folder

    def _apart(self) -> Mesh:
        if self.apart is None:
            self.apart = self.mesh.with_control_group(self.timeout)
        return self.apart

    def wait(self, seconds: float | None = None) -> None:
        """Until the last save is on the disk, or for so many seconds. Raises UserError if it could not be written."""
        if self.writing is not None and self.writing.ended(seconds):
            writing, self.writing = self.writing, None
            writing.check()

    def leave(self) -> None:
        """Give what is being written some time; says so if it fails, since the run ends for another reason."""
        if self.writing is not None and self.writing.ended(PATIENCE) and self.writing.error is not None:
            print(f"{self.writing.error}", file=sys.stderr)

    @property
    def failed(self) -> bool:
        """Whether `wait` would raise now, as it soon will on all ranks."""
        return self.writing is not None and self.writing.error is not None

    def _write(
        self, mesh: Mesh, folder: Path, aside: Path, pieces: StateChunks, meta: dict[str, Any]
    ) -> None:
        with written(f"checkpoint {folder}", aside):
            files = mesh.all_gather_objects(mesh.on_all_ranks(lambda: self._write_mine(aside, pieces)))
            mesh.on_main(lambda: self._publish(aside, folder, meta, files))

    def _write_mine(self, aside: Path, pieces: StateChunks) -> dict[str, Any]:
        if not aside.is_dir():
            raise UserError(
                f"rank {self.mesh.rank} does not see {aside}, which rank 0 made: let output_dir be on a file system "
                "that all machines share"
            )
        return seal_files(aside, write_chunks(aside, pieces, self.mesh.rank, self.mesh.world_size))

    def _publish(self, aside: Path, folder: Path, meta: dict[str, Any], files: list[dict[str, Any]]) -> None:
        others = (path for path in aside.rglob("*.json") if path.is_file())
        entries = seal_files(aside, others)
        for of_rank in files:
            entries |= of_rank
        write_manifest(aside, meta, entries)
        publish(aside, folder)
        self.prune()

    def validated(self, step: int, loss: float) -> None:
        """Note the validation loss after ``step`` steps, by which the best checkpoints stay, on every rank or one."""
        self.losses[step] = loss
        if self.mesh.is_main:
            file = self.folder / LOSSES
            aside = file.with_name(f"{file.name}.tmp")
            with written(f"{file}", aside):
                aside.write_text(json.dumps(self.losses, indent=1) + "\n", encoding="utf-8")
                aside.replace(file)

    def prune(self) -> None:
        """Remove what is not to stay, on the first rank; the newest that is whole, as read again, always stays."""
        folders = {step: path for path in self.folder.glob("step-*") if (step := step_of(path)) is not None}
        old = folders.keys() - kept(folders, self.config, dict(self.losses))
        if old:
            old -= {next((step for step in sorted(folders, reverse=True) if is_whole(folders[step])), None)}
        for step in sorted(old):
            aside = folders[step].rename(folders[step].with_name(f"{folders[step].name}.tmp"))
            shutil.rmtree(aside)  # never seen half removed


def kept(steps: Iterable[int], config: CheckpointConfig, losses: Mapping[int, float]) -> set[int]:
    """Which checkpoints stay.

    Args:
        losses: validation losses, by step, of those that have one.
    """
    ordered = sorted(steps)
    every = {step for step in ordered if config.keep_every is not None and step % config.keep_every == 0}
    finite = [step for step in ordered if math.isfinite(losses.get(step, math.nan))]
    best = sorted(finite, key=lambda step: (losses[step], step))[: config.keep_best]
    return {*ordered[-config.keep_last :], *every, *best}


def read_losses(file: Path) -> dict[int, float]:
    """What `Checkpoints.validated` noted. Raises UserError if it cannot be read."""
    if not file.exists():
        return {}
    try:
        return {int(step): float(loss) for step, loss in json.loads(file.read_text(encoding="utf-8")).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} holds no losses by step ({error}): delete it, and checkpoint.keep_best begins anew."
        ) from None


def _begin(aside: Path, describe: Callable[[Path], object]) -> None:
    aside.mkdir()
    describe(aside)


def _is_there(folder: Path) -> bool:
    """Whether a checkpoint is there and whole; one that is not is moved out of the way."""
    if folder.exists() and not is_whole(folder):
        folder.rename(_free(folder.with_name(f"{folder.name}.broken")))
    return folder.exists()


def _free(path: Path) -> Path:
    """``path``, or with the first number that makes it new."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


class Writing:
    """A save that goes on in a thread of its own, which does not keep the process from ending."""

    def __init__(self, write: Callable[[], None]) -> None:
        self.error: BaseException | None = None
        self._write = write
        self._thread = Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._write()
        except BaseException as error:
            self.error = error

    def ended(self, seconds: float | None = None) -> bool:
        """Wait for its end, for so many seconds at most; whether it came."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def check(self) -> None:
        """Raise what it raised."""
        if self.error is not None:
            raise self.error


class Copy:
    """Room for one copy of what this rank writes, in the memory of the CPU, used again for every save."""

    def __init__(self) -> None:
        self.room: dict[tuple[str, str], Tensor] = {}

    def of(self, pieces: StateChunks) -> StateChunks:
        """The same pieces, which steps do not change; they last until the next call."""
        copied = {
            part: {
                name: TensorChunk(self._room(part, name, piece.tensor), piece.offsets)
                for name, piece in named.items()
            }
            for part, named in pieces.items()
        }
        on_gpu = False
        for part, named in pieces.items():
            for name, piece in named.items():
                copied[part][name].tensor.copy_(piece.tensor, non_blocking=True)
                on_gpu |= piece.tensor.is_cuda
        if on_gpu:
            torch.accelerator.synchronize()
        return copied

    def _room(self, part: str, name: str, like: Tensor) -> Tensor:
        room = self.room.get((part, name))
        if room is None or room.shape != like.shape or room.dtype != like.dtype:
            room = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
            self.room[part, name] = room
        return room
