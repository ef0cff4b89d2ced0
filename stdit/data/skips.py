"""Clips that fail to decode while training: count them, list them in a file, and stop the run at too many."""

import json
import logging
from collections.abc import Iterable
from pathlib import Path

from stdit.data.manifest.reading import Skipped, summarise
from stdit.errors import UserError

logger = logging.getLogger(__name__)


class SkipList:
    """A list that keeps nothing, for ranks that do not write."""

    def add(self, skipped: Skipped, step: int | None) -> None:
        """Record a clip that failed in a step; None: before the first."""


class SkipFile(SkipList):
    """`skipped.jsonl`: one line per failed clip (path, reason, step), once per run, across resumes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._listed: set[str] | None = None

    def add(self, skipped: Skipped, step: int | None) -> None:
        """Append a line to the file. Raises UserError if it cannot be written."""
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
        """Return the paths that the file lists; remove an incomplete last line, which a killed process leaves.

        A line that cannot be read lists nothing: its clip is listed again if it fails again.
        """
        if not self.path.exists():
            return set()
        text = self.path.read_text(encoding="utf-8", errors="replace")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            self.path.write_text(whole, encoding="utf-8")
        return {path for line in whole.split("\n") if (path := _path(line)) is not None}


def _path(line: str) -> str | None:
    """Return the path in a line; None if it cannot be read."""
    try:
        path = json.loads(line)["path"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return path if isinstance(path, str) else None


class SkipTally:
    """Count the files that fail while training; raise if they are more than a share of all `files`."""

    def __init__(self, files: int, max_share: float, listed: SkipList | None = None) -> None:
        self.files, self.max_share = files, max_share
        self.listed = listed or SkipList()
        self.failed: dict[str, str] = {}

    @property
    def limit(self) -> int:
        """Number of files that may fail."""
        return int(self.max_share * self.files)

    def add(self, skipped: Iterable[Skipped], step: int | None = None) -> None:
        """Count failed files. Raises UserError if too many different files have failed so far.

        Args:
            step: the step in which they failed; None: before the first.
        """
        for path, reason in skipped:
            if path not in self.failed:
                logger.warning("skipped: %s cannot be read: %s", path, reason)
                self.listed.add(Skipped(path, reason), step)
            self.failed[path] = reason
        if len(self.failed) > self.limit:
            raise self.error(
                f"more than data.max_skipped_share = {self.max_share:g}: repair or remove the files, or "
                "raise the share"
            )

    def error(self, rule: str) -> UserError:
        """Return an error that states how many files failed, the rule, and the reasons."""
        failed = [Skipped(path, f"cannot be read: {reason}") for path, reason in self.failed.items()]
        message = f"{len(failed)} of {self.files} files failed to decode, {rule}"
        return UserError("\n".join([message, *summarise(failed)]))
