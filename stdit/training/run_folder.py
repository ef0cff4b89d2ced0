"""The folder of a run: lock it, find the checkpoint to resume from, and write config and codec."""

import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from stdit.atomic_files import atomic_write
from stdit.checkpoint_files import META
from stdit.errors import UserError
from stdit.lora.config import find_initial_adapter
from stdit.pipelines.sources import find_initial_weights
from stdit.settings import to_yaml
from stdit.training.checkpoint import find_checkpoint
from stdit.training.config import TrainConfig
from stdit.training.disk import disk_errors, replace_folder
from stdit.training.experiment import experiment_key
from stdit.training.lineage import check_can_resume

if TYPE_CHECKING:
    from stdit.codecs.base import VideoCodec

_SINCE = "%Y-%m-%d %H:%M:%S UTC"


@contextmanager
def lock_run_folder(config: TrainConfig) -> Iterator[tuple[Path, Path | None]]:
    """Create and lock the run folder for the time of a block; yield ``(folder, checkpoint to resume from or None)``.

    Nothing that takes long to import or to read comes before the lock, so that errors come quickly.

    Raises:
        UserError: if the folder cannot be written, another process trains there, its checkpoints are of another
            model, or ``init_from`` has no weights.
    """
    folder, checkpoint = config.run_folder, find_start(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a+", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}): choose another with --output_dir or --name."
        ) from None
    with lock:
        if not _lock(lock.fileno()):
            raise UserError(
                f"another process trains in {folder} ({_holder(folder)}): wait for it, or choose another --name."
            )
        lock.truncate(0)
        lock.write(
            f"{socket.gethostname()}, process {os.getpid()}, since {time.strftime(_SINCE, time.gmtime())}\n"
        )
        lock.flush()
        try:
            yield folder, checkpoint
        finally:
            if _names(folder) == [".lock"]:  # the run ended before it wrote anything
                shutil.rmtree(folder, ignore_errors=True)


def find_start(config: TrainConfig) -> Path | None:
    """Return the checkpoint from which a run resumes; None: it starts at step 0. Print what is to know about it.

    Raises:
        UserError: if its checkpoints are of another model, or ``init_from`` or ``lora.init_from`` has no weights.
    """
    folder = config.run_folder
    checkpoint, skipped = find_checkpoint(config.resume, folder / "checkpoints")
    for reason in skipped:
        print(f"checkpoint skipped: {reason}", flush=True)
    if checkpoint is not None:
        check_can_resume(checkpoint, experiment_key(config))
    elif config.init_from is not None:
        weights = find_initial_weights(config.init_from)
        if not (weights / META).is_file():
            print(f"init_from: {weights} has no {META}: a damaged file would not be noticed", flush=True)
    if checkpoint is None and config.lora.init_from is not None:
        find_initial_adapter(config.lora.init_from)
    if (folder / "pipeline").exists() and not any((folder / "checkpoints").glob("step-*")):
        raise UserError(
            f"{folder} has a trained pipeline, but no checkpoint to resume from: choose another --name (and "
            f"start from its weights by --init_from {folder}), or move {folder} away."
        )
    return checkpoint


def write_run_files(folder: Path, config: TrainConfig, codec: "VideoCodec", new: bool) -> None:
    """Write the files that describe a run: ``config.yaml`` and, if runs keep it, ``codec/``.

    Args:
        new: replace the codec that an earlier run without a checkpoint left.
    """
    target = folder / "codec"
    if new:
        shutil.rmtree(target, ignore_errors=True)
    if codec.saved_with_runs and not target.is_dir():
        with replace_folder(f"codec {target}", target) as aside:
            codec.save_pretrained(aside)
    with disk_errors(f"run {folder}", folder / "config.yaml.tmp"):
        if config.validation.prompts:
            (folder / "samples").mkdir(exist_ok=True)
        with atomic_write(folder / "config.yaml") as file:
            file.write_text(to_yaml(config), encoding="utf-8")


def _names(folder: Path) -> list[str]:
    """Return the names in a folder; none if it has vanished, which another error reports."""
    try:
        return [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []


def _holder(folder: Path) -> str:
    """Return what the process that holds the lock wrote about itself."""
    return (folder / ".lock").read_text(encoding="utf-8", errors="replace").strip() or "it has just started"


def _lock(descriptor: int) -> bool:
    """Lock an open file for the life of this process; return False if another process holds it.

    Loader processes, which may live a little longer, do not inherit the lock: the run can be restarted at once.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks
        return True
    return True
