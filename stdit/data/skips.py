"""Clips that fail in training: counted, listed in a file, and too many for a run to go on."""

import json
import logging
from collections.abc import Iterable
from pathlib import Path

from stdit.data.manifest.reading import Skipped, summarise
from stdit.errors import UserError

logger = logging.getLogger(__name__)


class SkipList:
    """Keeps nothing: the list of ranks that do not write."""

    def add(self, skipped: Skipped, step: int | None) -> None:
        """A clip that failed, in a step or before the first."""


class SkipFile(SkipList):
    """`skipped.jsonl`: path, reason and step of every clip that failed, a line each, once for all parts of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._listed: set[str] | None = None

    def add(self, skipped: Skipped, step: int | None) -> None:
        """Append a line, on disk as soon as it is written. Raises UserError when the disk refuses."""
        try:
            if self._listed is None:
                self._listed = self._read()
            if skipped.path in self._listed:
                return
            line = {"path": skipped.path, "reason": skipped.reason, "step": step}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written ({error.strerror}): make room on the disk and run the same command "
                "again"
            ) from error
        self._listed.add(skipped.path)

    def _read(self) -> set[str]:
        """Paths listed by earlier parts of the run. What a killed process left of a line is cut off."""
        if not self.path.exists():
            return set()
        text = self.path.read_text(encoding="utf-8", errors="replace")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            self.path.write_text(whole, encoding="utf-8")
        return {json.loads(line)["path"] for line in whole.splitlines()}


class SkipTally:
    """Counts the files that fail in training, and stops the run when they are more than a share of `files`, all."""

    def __init__(self, files: int, max_share: float, listed: SkipList | None = None) -> None:
        self.files, self.max_share = files, max_share
        self.listed = listed or SkipList()
        self.failed: dict[str, str] = {}

    @property
    def limit(self) -> int:
        """The number of files that may fail."""
        return int(self.max_share * self.files)

    def add(self, skipped: Iterable[Skipped], step: int | None = None) -> None:
        """Raises UserError when too many different files have failed so far.

        Args:
            step: in which they failed; None: before the first.
        """
        for path, reason in skipped:
            if path not in self.failed:
                logger.warning("left out: %s cannot be read: %s", path, reason)
                self.listed.add(Skipped(path, reason), step)
            self.failed[path] = reason
        if len(self.failed) > self.limit:
            raise self.error(
                f"more than data.max_skipped_share = {self.max_share:g}: repair or remove the files, or "
                "raise the share"
            )

    def error(self, rule: str) -> UserError:
        failed = [Skipped(path, f"cannot be read: {reason}") for path, reason in self.failed.items()]
        message = f"{len(failed)} of {self.files} files failed to decode, {rule}"
        return UserError("\n".join([message, *summarise(failed)]))
