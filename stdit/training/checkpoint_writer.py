"""Write checkpoints, in the background if asked, and remove old ones."""

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

from stdit.checkpoint_files import is_whole, publish, seal_files, step_folders, write_manifest
from stdit.errors import UserError
from stdit.hashing import read_sealed, sealed_json
from stdit.parallel.processes.mesh import Mesh
from stdit.parallel.processes.storage import SavePlan, StateChunks, StateDicts, TensorChunk, write_chunks
from stdit.training.config import CheckpointConfig
from stdit.training.disk import disk_errors

_LOSSES_FILE = "validation_loss.json"
EXIT_WAIT_SECONDS = 60.0
"""How long a run that ends with an error waits for the checkpoint in progress."""


class CheckpointWriter:
    """The ``checkpoints`` folder of a run. Every rank has one and must make the same calls.

    Each rank writes its files of a checkpoint to a folder aside, flushed and hashed; one rename makes it visible.
    With ``checkpoint.asynchronous`` a rank first copies what it writes, and a thread writes the copy while the next
    steps change the state. The threads of the ranks communicate in a control group of their own.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, mesh: Mesh, timeout: float = 1800.0) -> None:
        """Create the folder, and remove what an interrupted save left.

        Args:
            timeout: seconds that the thread of a rank waits for those of the others.
        """
        self.folder, self.config, self.mesh, self.timeout = folder, config, mesh, timeout
        self.save_plan, self.copy = SavePlan(mesh), HostCopy()
        self.thread_mesh: Mesh | None = None
        self.writing: BackgroundWrite | None = None
        self.seconds: dict[str, float] = {}
        """Of the last save: how long training stopped for it, and waited for the save before it."""
        self.losses = _read_losses(folder / _LOSSES_FILE)
        """Validation losses by step."""
        self.best_step: int | None = None
        """A step whose checkpoint stays, for ``validation.patience``."""
        if mesh.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            for aside in folder.glob("step-*.tmp"):
                shutil.rmtree(aside)

    def save(
        self,
        step: int,
        state: StateDicts,
        meta: dict[str, Any],
        write_more: Callable[[Path], object] = lambda folder: None,
        at_once: bool = False,
    ) -> Path:
        """Save the state after ``step`` steps; it gets its final name only when all of it is on the disk.

        Args:
            meta: content of ``meta.json`` beside sizes and hashes.
            write_more: writes more files into the folder that it is given; called on the main rank.
            at_once: finish before returning, as without ``checkpoint.asynchronous``; otherwise call `wait`.

        Raises:
            UserError: on every rank, if the disk cannot be written, in this save or in the one before. Nothing of the
                attempt is left, and older checkpoints are unchanged.
        """
        begin = time.perf_counter()
        self.wait()
        waited = time.perf_counter() - begin
        folder = self.folder / f"step-{step:08d}"
        aside = folder.with_name(f"{folder.name}.tmp")
        with disk_errors(f"checkpoint {folder}", aside):
            if self.mesh.on_main(lambda: _exists_whole(folder)):
                return folder
            self.mesh.on_main(lambda: _begin(aside, write_more))
        chunks = self.save_plan.chunks(state)
        meta = {"step": step, **meta}
        if at_once or not self.config.asynchronous:
            self._write(self.mesh, folder, aside, chunks, meta)
        else:
            copied, mesh = self.copy.of(chunks), self._thread_mesh()
            self.writing = BackgroundWrite(lambda: self._write(mesh, folder, aside, copied, meta))
        seconds = {"checkpoint_seconds": time.perf_counter() - begin, "checkpoint_wait_seconds": waited}
        self.seconds = {name: round(value, 4) for name, value in seconds.items()}
        return folder

    def _thread_mesh(self) -> Mesh:
        if self.thread_mesh is None:
            self.thread_mesh = self.mesh.with_control_group(self.timeout)
        return self.thread_mesh

    def wait(self, seconds: float | None = None) -> None:
        """Wait until the last save is on the disk, for ``seconds`` at most. Raises UserError if it failed."""
        if self.writing is not None and self.writing.ended(seconds):
            writing, self.writing = self.writing, None
            writing.check()

    def wait_at_exit(self) -> None:
        """Wait some time for the save in progress; print its error, because the run ends with another one."""
        if (
            self.writing is not None
            and self.writing.ended(EXIT_WAIT_SECONDS)
            and self.writing.error is not None
        ):
            print(f"{self.writing.error}", file=sys.stderr)

    @property
    def failed(self) -> bool:
        """Whether the save in progress has failed, so that `wait` would raise."""
        return self.writing is not None and self.writing.error is not None

    def _write(
        self, mesh: Mesh, folder: Path, aside: Path, chunks: StateChunks, meta: dict[str, Any]
    ) -> None:
        with disk_errors(f"checkpoint {folder}", aside):
            files = mesh.all_gather_objects(mesh.on_all_ranks(lambda: self._write_mine(aside, chunks)))
            mesh.on_main(lambda: self._publish(aside, folder, meta, files))

    def _write_mine(self, aside: Path, chunks: StateChunks) -> dict[str, Any]:
        if not aside.is_dir():
            raise UserError(
                f"rank {self.mesh.rank} does not see {aside}, which rank 0 created: put output_dir on a file "
                "system that all machines share"
            )
        return seal_files(aside, write_chunks(aside, chunks, self.mesh.rank, self.mesh.world_size))

    def _publish(self, aside: Path, folder: Path, meta: dict[str, Any], files: list[dict[str, Any]]) -> None:
        entries = {name: entry for of_rank in files for name, entry in of_rank.items()}
        others = (path for path in aside.rglob("*") if path.is_file())
        entries |= seal_files(
            aside, (path for path in others if path.relative_to(aside).as_posix() not in entries)
        )
        write_manifest(aside, meta, entries)
        publish(aside, folder)
        self.prune()

    def record_loss(self, step: int, loss: float) -> None:
        """Record the validation loss after ``step`` steps, for ``checkpoint.keep_best``, on every rank or one."""
        self.losses[step] = loss
        if self.mesh.is_main:
            file = self.folder / _LOSSES_FILE
            aside = file.with_name(f"{file.name}.tmp")
            with disk_errors(f"{file}", aside):
                aside.write_text(sealed_json(self.losses), encoding="utf-8")
                aside.replace(file)

    def prune(self) -> None:
        """Remove old checkpoints, on the main rank. The newest whole one, verified by reading it, always stays."""
        folders = step_folders(self.folder)
        old = folders.keys() - steps_to_keep(folders, self.config, dict(self.losses)) - {self.best_step}
        if old:
            old -= {next((step for step, folder in folders.items() if is_whole(folder)), None)}
        for step in sorted(old):
            aside = folders[step].rename(folders[step].with_name(f"{folders[step].name}.tmp"))
            shutil.rmtree(aside)  # never seen half removed


def steps_to_keep(steps: Iterable[int], config: CheckpointConfig, losses: Mapping[int, float]) -> set[int]:
    """Return the steps whose checkpoints stay.

    Args:
        losses: validation losses by step; not every step has one.
    """
    ordered = sorted(steps)
    every = {step for step in ordered if config.keep_every is not None and step % config.keep_every == 0}
    finite = [step for step in ordered if math.isfinite(losses.get(step, math.nan))]
    best = sorted(finite, key=lambda step: (losses[step], step))[: config.keep_best]
    return {*ordered[-config.keep_last :], *every, *best}


def _read_losses(file: Path) -> dict[int, float]:
    """Return what `CheckpointWriter.record_loss` wrote. Raises UserError if it cannot be read."""
    if not file.exists():
        return {}
    try:
        return {int(step): float(loss) for step, loss in read_sealed(file).items()}
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{file} holds no losses by step ({error}): delete it, and checkpoint.keep_best starts again."
        ) from None


def _begin(aside: Path, write_more: Callable[[Path], object]) -> None:
    aside.mkdir()
    write_more(aside)


def _exists_whole(folder: Path) -> bool:
    """Return whether a complete checkpoint exists; move a broken one out of the way."""
    if folder.exists() and not is_whole(folder):
        folder.rename(_free(folder.with_name(f"{folder.name}.broken")))
    return folder.exists()


def _free(path: Path) -> Path:
    """Return ``path``, or with the first number appended that makes it a new name."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


class BackgroundWrite:
    """A save in a daemon thread, which does not keep the process alive."""

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
        """Wait for its end, for ``seconds`` at most; return whether it has ended."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def check(self) -> None:
        """Raise the error of the thread, if there was one."""
        if self.error is not None:
            raise self.error


class HostCopy:
    """One copy of what this rank writes, in CPU memory; its buffers are reused by every save."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, str], Tensor] = {}

    def of(self, chunks: StateChunks) -> StateChunks:
        """Copy chunks of the state, so that steps do not change them; the copy is valid until the next call."""
        copied = {
            part: {
                name: TensorChunk(self._buffer(part, name, chunk.tensor), chunk.offsets)
                for name, chunk in named.items()
            }
            for part, named in chunks.items()
        }
        on_gpu = False
        for part, named in chunks.items():
            for name, chunk in named.items():
                copied[part][name].tensor.copy_(chunk.tensor, non_blocking=True)
                on_gpu |= chunk.tensor.is_cuda
        if on_gpu:
            torch.accelerator.synchronize()
        return copied

    def _buffer(self, part: str, name: str, like: Tensor) -> Tensor:
        buffer = self.buffers.get((part, name))
        if buffer is None or buffer.shape != like.shape or buffer.dtype != like.dtype:
            buffer = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
            self.buffers[part, name] = buffer
        return buffer
