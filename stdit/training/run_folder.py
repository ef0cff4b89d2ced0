"""The folder of a run: whose it is, and where the run goes on. Imports nothing heavy: errors come quickly."""

import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stdit.errors import UserError
from stdit.pipelines.loading import find_checkpoint_source
from stdit.training.checkpoint import check_same_experiment, find_checkpoint
from stdit.training.config import TrainConfig, experiment_key

SINCE = "%Y-%m-%d %H:%M:%S UTC"


@contextmanager
def claimed(config: TrainConfig) -> Iterator[tuple[Path, Path | None]]:
    """Make the run folder, lock it, and find the checkpoint to go on from: ``(folder, checkpoint or None)``.

    Raises:
        UserError: if the folder cannot be written, another process trains there, it is another run's, or there
            are no weights to start from where ``init_from`` says.
    """
    folder = config.run_folder
    checkpoint, passed_over = find_checkpoint(config.resume, folder / "checkpoints")
    for reason in passed_over:
        print(f"passed over: {reason}", flush=True)
    if checkpoint is not None:
        check_same_experiment(checkpoint, experiment_key(config))
    elif config.init_from is not None:
        find_weights(config.init_from)
    if (folder / "pipeline").exists() and not any((folder / "checkpoints").glob("step-*")):
        raise UserError(
            f"{folder} has a trained pipeline, but no checkpoint to go on from: choose another --name (and "
            f"start from its weights by --init_from {folder}), or move {folder} away."
        )
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
            f"{socket.gethostname()}, process {os.getpid()}, since {time.strftime(SINCE, time.gmtime())}\n"
        )
        lock.flush()
        try:
            yield folder, checkpoint
        finally:
            if _names(folder) == [".lock"]:  # it ended before it began
                shutil.rmtree(folder, ignore_errors=True)


def find_weights(init_from: str) -> Path:
    """The model's folder, or the checkpoint, whose weights a run starts from. Raises UserError if there is none."""
    folder = Path(init_from)
    weights = "diffusion_pytorch_model.safetensors"
    if (folder / weights).is_file() or (folder / f"{weights}.index.json").is_file():
        return folder
    try:
        source = find_checkpoint_source(folder)
    except UserError as error:
        raise UserError(f"init_from = {init_from}: {error}") from None
    return source.path / "transformer" if source.is_pipeline else source.path


def _names(folder: Path) -> list[str]:
    """What is in a folder; nothing if it has gone, as the error that ends the run will say."""
    try:
        return [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []


def _holder(folder: Path) -> str:
    """What the process that has the lock says about itself."""
    return (folder / ".lock").read_text(encoding="utf-8", errors="replace").strip() or "it has just begun"


def _lock(descriptor: int) -> bool:
    """Lock an open file for as long as this process lives; False if another has it.

    Loader processes that outlive it a little do not have the lock, so that it can be started anew at once.
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
