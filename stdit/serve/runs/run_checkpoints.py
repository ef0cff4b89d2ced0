"""Checkpoints of runs, and which of them are whole. Imports no torch."""

import os
import queue
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stdit.checkpoint_files import read_meta, step_folders, verify
from stdit.errors import UserError

_MOST_KNOWN = 1000
"""Checkpoints whose state is kept."""
_Files = dict[str, tuple[int, int]]
"""Name to size and time of the last change (ns)."""


@dataclass(frozen=True)
class RunCheckpoint:
    """A checkpoint of a run."""

    name: str
    step: int
    bytes: int
    state: Literal["whole", "broken"]
    reason: str | None
    """Why it is broken."""
    verified: bool
    """Whether its hashes were computed; else it is whole as far as the sizes of its files tell."""
    model: str
    """Id of its model in ``/v1/models``."""


class CheckpointStates:
    """The states of checkpoints.

    A manifest and the sizes of files are checked at once. Their hashes take seconds for each GiB: a thread computes
    them once for each state of the files (sizes and times), after the first listing, and later listings have the
    result.
    """

    def __init__(self) -> None:
        self._verified: OrderedDict[Path, tuple[_Files, str | None]] = OrderedDict()
        self._waiting: set[Path] = set()
        self._queue: queue.SimpleQueue[Path] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def of_run(self, run: Path) -> list[RunCheckpoint]:
        """Return the checkpoints of a run by step; one that vanishes meanwhile is left out."""
        steps = sorted(step_folders(run / "checkpoints").items())
        return [found for step, folder in steps if (found := self._state(run.name, step, folder))]

    def wait(self) -> None:
        """Wait until all hashes that were asked for are computed."""
        done = threading.Event()
        while not done.wait(0.01):
            with self._lock:
                if not self._waiting:
                    done.set()

    def _state(self, run: str, step: int, folder: Path) -> RunCheckpoint | None:
        files = _files(folder)
        if files is None:
            return None
        reason, verified = _reason_of_sizes(folder, files), True
        if reason is None:
            with self._lock:
                known, found = self._verified.get(folder, (None, None))
                verified = known == files
                reason = found if verified else None
                if not verified:
                    self._ask_for(folder)
        return RunCheckpoint(
            name=folder.name,
            step=step,
            bytes=sum(size for size, _ in files.values()),
            state="broken" if reason else "whole",
            reason=reason,
            verified=verified,
            model=f"{run}/{folder.name}",
        )

    def _ask_for(self, folder: Path) -> None:
        if folder in self._waiting:
            return
        self._waiting.add(folder)
        self._queue.put(folder)
        if self._thread is None:
            # A daemon: the server may end while a large checkpoint is read.
            self._thread = threading.Thread(target=self._compute, name="checkpoints", daemon=True)
            self._thread.start()

    def _compute(self) -> None:
        while True:
            folder = self._queue.get()
            files = _files(folder)
            reason = None
            try:
                verify(folder)
            except UserError as error:
                reason = _short(folder, error)
            except OSError as error:
                reason = f"it cannot be read ({error.strerror})"
            with self._lock:
                if files is not None:
                    self._verified[folder] = (files, reason)
                    self._verified.move_to_end(folder)
                    if len(self._verified) > _MOST_KNOWN:
                        self._verified.popitem(last=False)
                self._waiting.discard(folder)


def _files(folder: Path) -> _Files | None:
    """Return the files of a checkpoint with their sizes and times; None if it has vanished."""
    found: _Files = {}
    try:
        for parent, folders, names in os.walk(folder):
            folders.sort()
            for name in names:
                path = Path(parent, name)
                status = path.stat()
                found[path.relative_to(folder).as_posix()] = (status.st_size, status.st_mtime_ns)
    except OSError:
        return None
    return found if folder.is_dir() else None


def _reason_of_sizes(folder: Path, files: _Files) -> str | None:
    """Return why a checkpoint is broken, as far as its manifest and the sizes of its files tell."""
    try:
        meta = read_meta(folder)
    except UserError as error:
        return _short(folder, error)
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    for name, entry in meta["files"].items():
        written = entry.get("bytes") if isinstance(entry, dict) else None
        if name not in files:
            return f"{name} is missing"
        if files[name][0] != written:
            return f"{name} has {files[name][0]} bytes, but {written} were written"
    return None


def _short(folder: Path, error: UserError) -> str:
    """Return the message of an error without the path of the folder."""
    return str(error).replace(f"checkpoint {folder}: ", "").replace(str(folder), folder.name)
