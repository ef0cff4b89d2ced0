"""The gallery's index: an SQLite file of what the videos of a folder say. Imports no torch."""

import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import astuple, fields
from hashlib import blake2b
from pathlib import Path

from stdit.serve.errors import RequestError
from stdit.serve.gallery.gallery_scan import VideoFacts, read_facts

UNREAD, OURS, OTHER = 0, 1, 2
"""State of a file: its metadata are not read yet; it is a video of ours; it is none."""
FACT_COLUMNS = ", ".join(one.name for one in fields(VideoFacts))
"""What the metadata of a video say, in the order of `VideoFacts`."""
_VERSION = 2
"""Of the tables; an index of another version is rebuilt."""
_TABLES = """
CREATE TABLE IF NOT EXISTS videos (
    id INTEGER PRIMARY KEY, key TEXT UNIQUE NOT NULL, folder TEXT NOT NULL, name TEXT NOT NULL,
    changed INTEGER NOT NULL, bytes INTEGER NOT NULL, state INTEGER NOT NULL DEFAULT 0, folded TEXT,
    prompt TEXT, seed INTEGER, checkpoint TEXT, checkpoint_step INTEGER,
    width INTEGER, height INTEGER, num_frames INTEGER, num_inference_steps INTEGER, fps REAL);
CREATE INDEX IF NOT EXISTS videos_by_folder ON videos (folder);
CREATE INDEX IF NOT EXISTS videos_by_time ON videos (changed, id);
CREATE INDEX IF NOT EXISTS videos_by_state ON videos (state, changed, id);
CREATE INDEX IF NOT EXISTS videos_by_checkpoint ON videos (checkpoint);
"""


class GalleryIndex:
    """An index file, opened for each piece of work; it may be deleted at any time, and is then rebuilt.

    Args:
        file: of the index.
        root: folder of the videos.
    """

    def __init__(self, file: Path, root: Path) -> None:
        self.file, self.root = file, root
        self.made = 0
        """How many times the tables were made here: an index that was deleted has lost its rows."""
        self._opening = threading.Lock()
        with suppress(OSError):  # which `opened` reports
            file.parent.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def opened(self) -> Iterator[sqlite3.Connection]:
        """Open the index for a block.

        Raises:
            RequestError: if it cannot be written, or is damaged; it is then rebuilt the next time.
        """
        try:
            with closing(self._open()) as index:
                yield index
        except sqlite3.OperationalError as error:
            raise RequestError(
                f"index of the gallery {self.file}: cannot be used ({error}): make room on the disk, and check who "
                "may write there.",
                status=503,
                code="index_not_written",
            ) from None
        except sqlite3.DatabaseError as error:
            self._remove()
            raise RequestError(
                f"index of the gallery {self.file}: was damaged ({error}), and is rebuilt: try again.",
                status=503,
                code="index_damaged",
            ) from None

    def compare(
        self, index: sqlite3.Connection, folder: str, files: dict[str, tuple[int, int]]
    ) -> list[Path]:
        """Bring the rows of one folder up to date; return the files that have vanished or changed.

        Args:
            folder: as `scan_folders` yields it, like ``files``, which is emptied.
        """
        gone, changed, stale = [], [], []
        query = "SELECT id, name, changed, bytes FROM videos WHERE folder = ?"
        for number, name, *before in index.execute(query, (folder,)):
            now = files.pop(name, None)
            if now is None:
                gone.append((number,))
            elif now != tuple(before):
                changed.append((*now, number))
            if now != tuple(before):
                stale.append(self.root / folder / name)
        if gone or changed or files:
            with index:
                index.executemany("DELETE FROM videos WHERE id = ?", gone)
                index.executemany(
                    f"UPDATE videos SET changed = ?, bytes = ?, state = {UNREAD} WHERE id = ?", changed
                )
                index.executemany(
                    "INSERT OR REPLACE INTO videos (key, folder, name, changed, bytes) VALUES (?, ?, ?, ?, ?)",
                    ((_key(folder + name), folder, name, *now) for name, now in files.items()),
                )
        return stale

    def read_unread(self, index: sqlite3.Connection, count: int) -> bool:
        """Read the newest ``count`` files that are not read yet; return whether there were any."""
        rows = index.execute(
            f"SELECT id, folder, name FROM videos WHERE state = {UNREAD} ORDER BY changed DESC, id DESC LIMIT ?",
            (count,),
        ).fetchall()
        self._read(index, rows)
        return bool(rows)

    def read_newest(
        self,
        index: sqlite3.Connection,
        count: int,
        where: Sequence[str],
        values: Sequence[object],
        late: float,
    ) -> None:
        """Read those of the newest files that are not read yet, until ``count`` of ours are.

        Args:
            where: further conditions, with ``values``.
            late: time of the monotonic clock at which to stop.
        """
        conditions = " AND ".join([f"state != {OTHER}", *where])
        newest = f"WHERE {conditions} ORDER BY changed DESC, id DESC LIMIT ?"
        query = f"SELECT id, folder, name, state FROM videos {newest}"
        while time.monotonic() < late:
            rows = index.execute(query, (*values, count)).fetchall()
            unread = [row[:3] for row in rows if row[3] == UNREAD]
            if not unread:
                return
            self._read(index, unread, late)

    def _read(
        self, index: sqlite3.Connection, rows: Iterable[tuple[int, str, str]], late: float = float("inf")
    ) -> None:
        """Read the metadata of some files, until a time, and write what they say to the index."""
        found = []
        for number, folder, name in rows:
            found.append((*_columns(read_facts(self.root / folder / name)), number))
            if time.monotonic() > late:
                break
        values = ", ".join("?" * (2 + len(fields(VideoFacts))))
        with index:
            index.executemany(
                f"UPDATE videos SET (state, folded, {FACT_COLUMNS}) = ({values}) WHERE id = ?",
                found,
            )

    def _open(self) -> sqlite3.Connection:
        with self._opening:
            for last in (False, True):
                index = sqlite3.connect(self.file, timeout=10, isolation_level="IMMEDIATE")
                try:
                    version = _prepared(index)
                    self.made += version == 0
                    if version in (0, _VERSION):
                        return index
                except sqlite3.OperationalError:
                    index.close()
                    raise
                except sqlite3.DatabaseError:
                    index.close()
                    if last:
                        raise
                else:
                    index.close()
                self._remove()  # damaged, or of another version
        raise sqlite3.OperationalError("another version of it is made all the time")

    def _remove(self) -> None:
        for ending in ("", "-journal"):
            with suppress(OSError):
                os.unlink(f"{self.file}{ending}")


def _prepared(index: sqlite3.Connection) -> int:
    """Make the tables of a new file; return the version that the file had, 0 if it is new."""
    (version,) = index.execute("PRAGMA user_version").fetchone()
    if version == 0:
        # Not WAL: its index is mapped into memory, where another process that rebuilds the file would end this one.
        index.execute("PRAGMA journal_mode = DELETE")
        index.executescript(f"BEGIN IMMEDIATE;{_TABLES}PRAGMA user_version = {_VERSION};COMMIT;")
    index.execute("PRAGMA synchronous = NORMAL")
    return int(version)


def _key(path: str) -> str:
    """Return the id of a relative path."""
    return blake2b(path.encode(), digest_size=12).hexdigest()


def _columns(facts: VideoFacts | None) -> tuple[object, ...]:
    """Return state, folded prompt and facts of a file."""
    if facts is None:
        return (OTHER, None, *[None] * len(fields(VideoFacts)))
    return (OURS, facts.prompt.casefold(), *astuple(facts))
