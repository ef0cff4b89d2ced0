"""Requests to a running run other than signals: files in its folder, and the clock."""

import time
from pathlib import Path
from typing import NamedTuple


class Requested(NamedTuple):
    """What to do after the current step."""

    save: bool = False
    stop: bool = False


class NoRequests:
    """No requests: for all ranks but the main one, which exchanges its requests with them."""

    def poll(self) -> Requested:
        """Return what is requested now."""
        return Requested()

    def fulfilled(self) -> None:
        """Remove the requests that `poll` returned last, because a checkpoint was saved."""


class RequestFiles(NoRequests):
    """``touch outputs/<name>/save`` or ``stop``, from any shell; and a checkpoint every few minutes.

    Args:
        folder: of the run. Requests to an earlier part of the run, which ended before it saw them, are removed.
        minutes: between checkpoints; none: no limit.
    """

    def __init__(self, folder: Path, minutes: float | None) -> None:
        self.files = [folder / name for name in Requested._fields]
        self.seen: list[Path] = []
        self.seconds = None if minutes is None else 60 * minutes
        self.saved_at = time.monotonic()
        for file in self.files:
            if file.exists():
                file.unlink()
                print(f"{file} was a request to an earlier part of this run: removed")

    def poll(self) -> Requested:
        self.seen = [file for file in self.files if file.exists()]
        requested = Requested(*(file in self.seen for file in self.files))
        is_time = self.seconds is not None and time.monotonic() - self.saved_at >= self.seconds
        return requested._replace(save=requested.save or is_time)

    def fulfilled(self) -> None:
        self.saved_at = time.monotonic()
        for file in self.seen:
            file.unlink(missing_ok=True)
