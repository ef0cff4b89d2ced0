"""What is asked of a run while it trains, other than by signals: by files in its folder, and by the clock."""

import time
from pathlib import Path
from typing import NamedTuple


class Asked(NamedTuple):
    """What a run is to do after the step that it is in."""

    save: bool = False
    stop: bool = False


class Requests:
    """Hears of nothing, as all ranks but the first, which tells them."""

    def look(self) -> Asked:
        """What is asked for now."""
        return Asked()

    def obeyed(self) -> None:
        """A checkpoint is saved, and so what `look` told last is done."""


class RunRequests(Requests):
    """``touch outputs/<name>/save`` or ``stop``, from any shell; and a checkpoint every so many minutes.

    A file is removed when it is obeyed.
    """

    def __init__(self, folder: Path, minutes: float | None) -> None:
        """Remove requests to an earlier part of the run, which ended before it saw them."""
        self.files = [folder / name for name in Asked._fields]
        self.seen: list[Path] = []
        self.seconds = None if minutes is None else 60 * minutes
        self.since = time.monotonic()
        for file in self.files:
            if file.exists():
                file.unlink()
                print(f"{file} was asked of an earlier part of this run, and is removed")

    def look(self) -> Asked:
        self.seen = [file for file in self.files if file.exists()]
        asked = Asked(*(file in self.seen for file in self.files))
        is_time = self.seconds is not None and time.monotonic() - self.since >= self.seconds
        return asked._replace(save=asked.save or is_time)

    def obeyed(self) -> None:
        self.since = time.monotonic()
        for file in self.seen:
            file.unlink(missing_ok=True)
