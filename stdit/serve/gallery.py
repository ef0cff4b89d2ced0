"""Gallery: all videos below a folder of outputs, newest first. Imports no torch.

`GalleryIndex` keeps what the files say, by relative path, time and size, so that no file is read twice. Listing
waits for the few files that it shows; a thread reads the others, newest first. An id is looked up in the index, and
the file is then checked to lie in the folder: no path comes from a request.
"""

import os
import re
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stdit.errors import UserError
from stdit.serve.errors import RequestError
from stdit.serve.gallery_index import OTHER, OURS, UNREAD, GalleryIndex
from stdit.serve.gallery_scan import scan_folders
from stdit.serve.json_values import whole_text
from stdit.serve.thumbnails import remove_thumbnails, thumbnail

_SHOWN = (
    "id, key, folder, name, changed, bytes, state, prompt, seed, checkpoint, checkpoint_step, width, height,"
    " num_frames, fps"
)
_CURSOR = re.compile(r"(-?\d{1,19})-(\d{1,18})", re.ASCII)
_KEY = re.compile(r"[0-9a-f]{24}")
_BATCH = 32
"""Files read between two writes to the index."""
_PATIENCE = 0.5
"""Seconds that a listing waits for the scan of the folder, and again for the files that it shows."""
_MOST_WORDS = 20


@dataclass(frozen=True)
class GalleryVideo:
    """A video of the gallery; None: its metadata does not say."""

    id: str
    name: str
    """Of the file."""
    folder: str
    """Below the folder of outputs; empty for that itself."""
    created: float
    """Unix seconds."""
    bytes: int
    prompt: str
    seed: int | None
    checkpoint: str | None
    """Name of the run, or of the folder of the pipeline, that made it."""
    checkpoint_step: int | None
    width: int | None
    height: int | None
    num_frames: int | None
    fps: float | None
    seconds: float | None


@dataclass(frozen=True)
class GalleryPage:
    """Some videos of the gallery, newest first."""

    data: list[GalleryVideo]
    next: str | None
    """Where the next page begins; None: this is the last."""
    total: int
    """Videos that match, as far as they are known: see ``indexing``."""
    checkpoints: list[str]
    """Names to filter by."""
    indexing: bool
    """Whether files are still to be read, which a search does not find yet."""


class Gallery:
    """The videos below a folder.

    Args:
        root: the folder; it may not exist yet.
        database: file of the index, which is made if it is missing, damaged or of another version.
        thumbnails: folder of the thumbnails; None: beside the index.
        validation: also show the validation videos of runs.

    Raises:
        UserError: if the index cannot be written.
    """

    def __init__(
        self, root: Path, database: Path, thumbnails: Path | None = None, validation: bool = False
    ) -> None:
        self.root, self.validation = Path(os.path.realpath(root)), validation
        self.thumbnails = thumbnails or database.parent / "thumbnails"
        self.index = GalleryIndex(database, self.root)
        self._lock, self._scanned, self._closing = threading.Lock(), threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._next_scan = 0.0
        self._listings = 0
        with self.index.opened():
            pass

    def page(
        self, limit: int = 48, before: str | None = None, search: str = "", checkpoint: str | None = None
    ) -> GalleryPage:
        """Return the newest videos, or those before a cursor, that match.

        Args:
            limit: most videos of a page.
            before: `GalleryPage.next` of the page before this one.
            search: words that are all in the prompt, anywhere in it, in upper or lower case.
            checkpoint: one of `GalleryPage.checkpoints`.

        Raises:
            RequestError: for a cursor that is none, or too many words.
        """
        filters, wanted = _filters(search, checkpoint)
        after, place = _after(before)
        matching = filters or [f"state != {OTHER}"]
        self._look_again()
        with self._first(), self.index.opened() as index:
            if not filters:
                self.index.read_newest(index, limit + 1, after, place, time.monotonic() + _PATIENCE)
            rows = index.execute(
                f"SELECT {_SHOWN} FROM videos WHERE {' AND '.join(matching + after)}"
                " ORDER BY changed DESC, id DESC LIMIT ?",
                (*wanted, *place, limit + 1),
            ).fetchall()
            unread = next((number for number, row in enumerate(rows) if row[6] == UNREAD), limit)
            shown = rows[: min(limit, unread)]
            last = f"{shown[-1][4]}-{shown[-1][0]}" if shown else before
            count = f"SELECT count(*) FROM videos WHERE {' AND '.join(matching)}"
            names = index.execute(
                "SELECT DISTINCT checkpoint FROM videos WHERE checkpoint NOT NULL ORDER BY 1 LIMIT 500"
            )
            return GalleryPage(
                data=[_video(row) for row in shown],
                next=last if len(shown) < len(rows) else None,
                total=index.execute(count, wanted).fetchone()[0],
                checkpoints=[name for (name,) in names],
                indexing=_has_unread(index) or not self._scanned.is_set(),
            )

    def find(self, key: str) -> Path:
        """Return the file of a video's id. Raises RequestError (404) if there is none, or it has vanished."""
        row = None
        if _KEY.fullmatch(key):
            with self.index.opened() as index:
                query = f"SELECT folder, name FROM videos WHERE key = ? AND state = {OURS}"
                row = index.execute(query, (key,)).fetchone()
        file = self.root.joinpath(*row) if row else None
        is_there = file is not None and os.path.realpath(file) == str(file) and file.is_file()
        if file is None or not is_there:  # it is a link now, or gone
            self._next_scan = 0.0 if row else self._next_scan
            raise RequestError(
                f"id = {whole_text(key)[:40]!r}: there is no such video in the gallery: load the page again.",
                status=404,
                param="id",
                code="not_found",
            )
        return file

    def thumbnail(self, key: str) -> Path:
        """Return the thumbnail of a video's id. Raises UserError if it cannot be made; RequestError as `find`."""
        with self._first():
            return thumbnail(self.find(key), self.thumbnails)

    def delete(self, key: str) -> None:
        """Delete a video with the .json and .gif of the same name beside it.

        Raises:
            RequestError: as `find`; or if it cannot be deleted.
        """
        file = self.find(key)
        try:
            for path in (file.with_suffix(".json"), file.with_suffix(".gif"), file):
                path.unlink(missing_ok=True)
        except OSError as error:
            raise RequestError(
                f"{file.name} cannot be deleted ({error.strerror}): check who may write to its folder.",
                status=409,
                code="not_deleted",
            ) from None
        with suppress(OSError):
            remove_thumbnails(file, self.thumbnails)
        with self.index.opened() as index, index:
            index.execute("DELETE FROM videos WHERE key = ?", (key,))

    def expire(self) -> None:
        """Let the next listing scan the folder, whenever the last one did: a video has been written or deleted."""
        self._next_scan = 0.0

    def refresh(self) -> None:
        """Scan the folder, and read the files that are new, newest first; return when all are read."""
        self._scan()
        while not self._closing.is_set():
            if not self._scanned.is_set():  # a listing has asked for another
                self._scan()
            while self._listings and not self._closing.is_set():  # they come first
                time.sleep(0.005)
            with self.index.opened() as index:
                if not self.index.read_unread(index, _BATCH):
                    return

    def close(self) -> None:
        """End the thread that reads files; the index stays."""
        self._closing.set()
        if (thread := self._thread) is not None:
            thread.join()

    def _look_again(self) -> None:
        """Start a scan if the last one is old, and wait a moment for it."""
        with self._lock:
            is_old = time.monotonic() >= self._next_scan or not self.index.file.exists()
            if is_old and not self._closing.is_set():
                self._scanned.clear()
                if self._thread is None:
                    self._thread = threading.Thread(
                        target=self._refresh_as_asked, name="gallery", daemon=True
                    )
                    self._thread.start()
        self._scanned.wait(_PATIENCE)

    def _refresh_as_asked(self) -> None:
        """Refresh until no listing asks for a scan; an index that cannot be used is reported by the listing."""
        while True:
            try:
                self.refresh()
            except UserError:
                self._scanned.set()
            with self._lock:
                if self._scanned.is_set() or self._closing.is_set():
                    self._thread = None
                    return

    def _scan(self) -> None:
        """Bring the rows of all folders up to date with the files there, one folder at a time."""
        began, visited = time.monotonic(), set()
        self._next_scan = began + 2.0
        with self.index.opened() as index:
            for folder, files in scan_folders(self.root, self.validation):
                visited.add(folder)
                if files is not None:
                    self._compare(index, folder, files)
                if self._closing.is_set():
                    return
            for (folder,) in index.execute("SELECT DISTINCT folder FROM videos").fetchall():
                if folder not in visited:
                    self._compare(index, folder, {})
        if self._next_scan:  # a large folder on a slow disk is not scanned all the time
            self._next_scan = time.monotonic() + max(2.0, 20 * (time.monotonic() - began))
        self._scanned.set()

    def _compare(self, index: sqlite3.Connection, folder: str, files: dict[str, tuple[int, int]]) -> None:
        for stale in self.index.compare(index, folder, files):
            with suppress(OSError):
                remove_thumbnails(stale, self.thumbnails)

    @contextmanager
    def _first(self) -> Iterator[None]:
        """Let the thread that reads files wait while somebody waits for a page or a picture."""
        with self._lock:
            self._listings += 1
        try:
            yield
        finally:
            with self._lock:
                self._listings -= 1


def _filters(search: str, checkpoint: str | None) -> tuple[list[str], list[str]]:
    """Return the conditions of a listing, and their values; none: all videos, read or not."""
    words = whole_text(search).casefold().split()
    if len(words) > _MOST_WORDS:
        raise RequestError(
            f"search has {len(words)} words: at most {_MOST_WORDS} are looked for: leave some out.",
            param="search",
        )
    # Not FTS5: it finds whole words, and prompts in Chinese or Japanese have no spaces.
    conditions, values = ["instr(folded, ?) > 0"] * len(words), words
    if checkpoint is not None:
        conditions, values = [*conditions, "checkpoint = ?"], [*values, whole_text(checkpoint)]
    return [f"state = {OURS}", *conditions] if conditions else [], values


def _after(before: str | None) -> tuple[list[str], list[int]]:
    """Return the condition of a cursor, and its values."""
    if before is None:
        return [], []
    found = _CURSOR.fullmatch(before)
    if found is None or abs(int(found[1])) >= 2**63:
        raise RequestError(
            f"before = {whole_text(before)[:40]!r}: must be what `next` of the page before says; leave it out for "
            "the first page.",
            param="before",
        )
    return ["(changed, id) < (?, ?)"], [int(found[1]), int(found[2])]


def _has_unread(index: sqlite3.Connection) -> bool:
    query = f"SELECT EXISTS (SELECT 1 FROM videos WHERE state = {UNREAD})"
    return bool(index.execute(query).fetchone()[0])


def _video(row: Sequence[Any]) -> GalleryVideo:
    _, key, folder, name, changed, size, _, *facts = row
    frames, fps = facts[-2:]
    seconds = round(frames / fps, 3) if frames and fps else None
    shown = [key, name, folder.rstrip("/"), changed / 1e9, size, *facts, seconds]
    return GalleryVideo(*shown)
