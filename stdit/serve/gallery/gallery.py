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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from stdit.errors import UserError
from stdit.serve.errors import RequestError
from stdit.serve.gallery.gallery_index import OTHER, OURS, UNREAD, GalleryIndex
from stdit.serve.gallery.gallery_pages import (
    GALLERY_COLUMNS,
    GalleryPage,
    after_cursor,
    page_filters,
    video_of_row,
)
from stdit.serve.gallery.gallery_scan import scan_folders
from stdit.serve.gallery.thumbnails import remove_thumbnails, thumbnail
from stdit.serve.json_values import whole_text

_KEY = re.compile(r"[0-9a-f]{24}")
_BATCH = 32
"""Files read between two writes to the index."""
_PATIENCE = 0.5
"""Seconds that a listing waits for the scan of the folder, and again for the files that it shows."""


class Gallery:
    """The videos below a folder.

    Args:
        root: the folder; it may not exist yet.
        database: file of the index, which is made if it is missing, damaged or of another version.
        thumbnails: folder of the thumbnails; None: beside the index.
        validation: also show the validation videos of runs.
        changes: returns something else than before once a video was written or deleted: the next listing then scans
            the folder, whenever the last one did.

    Raises:
        UserError: if the index cannot be written.
    """

    def __init__(
        self,
        root: Path,
        database: Path,
        thumbnails: Path | None = None,
        validation: bool = False,
        changes: Callable[[], object] = lambda: None,
    ) -> None:
        self.root, self.validation = Path(os.path.realpath(root)), validation
        self.changes, self._seen = changes, changes()
        self.thumbnails = thumbnails or database.parent / "thumbnails"
        self.index = GalleryIndex(database, self.root)
        self._changed = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None
        self._scans_asked, self._scans_done = 0, 0
        self._next_scan, self._scanned_index = 0.0, 0
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
        filters, wanted = page_filters(search, checkpoint)
        after, place = after_cursor(before)
        matching = filters or [f"state != {OTHER}"]
        with self.index.opened():  # rebuilt if it was deleted
            pass
        self._look_again()
        with self._first(), self.index.opened() as index:
            if not filters:
                self.index.read_newest(index, limit + 1, after, place, time.monotonic() + _PATIENCE)
            rows = index.execute(
                f"SELECT {GALLERY_COLUMNS} FROM videos WHERE {' AND '.join(matching + after)}"
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
                data=[video_of_row(row) for row in shown],
                next=last if len(shown) < len(rows) else None,
                total=index.execute(count, wanted).fetchone()[0],
                checkpoints=[name for (name,) in names],
                indexing=_has_unread(index) or self._scans_done < self._scans_asked,
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

    def delete(self, key: str) -> Path:
        """Delete a video with the .json and .gif of the same name beside it; return its file.

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
        return file

    def expire(self) -> None:
        """Let the next listing scan the folder, whenever the last one did."""
        self._next_scan = 0.0

    def refresh(self) -> None:
        """Scan the folder, and read the files that are new, newest first; return when all are read."""
        with self._changed:
            self._scans_asked += 1
        self._do_what_is_asked()

    def close(self) -> None:
        """End the thread that reads files; the index stays."""
        self._closing = True
        if (thread := self._thread) is not None:
            thread.join()

    def _look_again(self) -> None:
        """Ask for a scan if the last one is old, and wait a moment for it."""
        changes = self.changes()
        with self._changed:
            if changes != self._seen:
                self._seen = changes
                self.expire()
            is_old = time.monotonic() >= self._next_scan or self._scanned_index != self.index.made
            if is_old and not self._closing:
                self._scans_asked += 1
                if self._thread is None:
                    self._thread = threading.Thread(target=self._work, name="gallery", daemon=True)
                    self._thread.start()
            asked = self._scans_asked
            self._changed.wait_for(lambda: self._scans_done >= asked, _PATIENCE)

    def _work(self) -> None:
        """Scan and read until no listing asks for more, or the index cannot be used, which the listing says, too."""
        failures = 0
        while True:
            try:
                self._do_what_is_asked()
            except UserError:
                failures += 1
            with self._changed:
                if self._scans_done >= self._scans_asked or self._closing or failures > 2:
                    self._scans_done, self._thread = self._scans_asked, None
                    self._changed.notify_all()
                    return

    def _do_what_is_asked(self) -> None:
        """Scan the folder as long as that is asked for, and read all files that are new, newest first."""
        while not self._closing:
            if self._scans_done < self._scans_asked:
                self._scan()
            while self._listings and self._scans_done >= self._scans_asked:  # they come first
                time.sleep(0.005)
            with self.index.opened() as index:
                if not self.index.read_unread(index, _BATCH):
                    return

    def _scan(self) -> None:
        """Bring the rows of all folders up to date with the files there, one folder at a time."""
        began, visited = time.monotonic(), set()
        with self._changed:
            asked, self._next_scan = self._scans_asked, began + 2.0
        with self.index.opened() as index:
            made = self.index.made
            for folder, files in scan_folders(self.root, self.validation):
                visited.add(folder)
                if files is not None:
                    self._compare(index, folder, files)
                if self._closing:
                    return
            for (folder,) in index.execute("SELECT DISTINCT folder FROM videos").fetchall():
                if folder not in visited:
                    self._compare(index, folder, {})
        with self._changed:
            if self._next_scan:  # a large folder on a slow disk is not scanned all the time
                self._next_scan = time.monotonic() + max(2.0, 20 * (time.monotonic() - began))
            self._scans_done, self._scanned_index = max(asked, self._scans_done), made
            self._changed.notify_all()

    def _compare(self, index: sqlite3.Connection, folder: str, files: dict[str, tuple[int, int]]) -> None:
        for stale in self.index.compare(index, folder, files):
            with suppress(OSError):
                remove_thumbnails(stale, self.thumbnails)

    @contextmanager
    def _first(self) -> Iterator[None]:
        """Let the thread that reads files wait while somebody waits for a page or a picture."""
        with self._changed:
            self._listings += 1
        try:
            yield
        finally:
            with self._changed:
                self._listings -= 1


def _has_unread(index: sqlite3.Connection) -> bool:
    query = f"SELECT EXISTS (SELECT 1 FROM videos WHERE state = {UNREAD})"
    return bool(index.execute(query).fetchone()[0])
