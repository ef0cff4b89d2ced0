"""The SQLite file of the jobs: its tables, and connections for threads and processes. Imports no torch."""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from stdit.errors import UserError

SCHEMA = 3
_TABLES = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL,
    client TEXT NOT NULL, key TEXT, request_hash TEXT,
    body TEXT NOT NULL, model TEXT NOT NULL, batch TEXT NOT NULL, work REAL NOT NULL, facts TEXT NOT NULL,
    state TEXT NOT NULL, worker TEXT, batch_size INTEGER, crashes INTEGER NOT NULL DEFAULT 0,
    crashes_alone INTEGER NOT NULL DEFAULT 0,
    step INTEGER NOT NULL DEFAULT 0, steps INTEGER NOT NULL DEFAULT 0, preview BLOB, preview_step INTEGER,
    created REAL NOT NULL, started REAL, finished REAL, changed INTEGER NOT NULL DEFAULT 0,
    file TEXT, bytes INTEGER, seconds REAL, error TEXT, param TEXT,
    UNIQUE (client, key));
CREATE INDEX IF NOT EXISTS of_state ON jobs (state, number);
CREATE INDEX IF NOT EXISTS of_change ON jobs (changed);
CREATE TRIGGER IF NOT EXISTS count_new AFTER INSERT ON jobs BEGIN
    UPDATE jobs SET changed = (SELECT max(changed) + 1 FROM jobs) WHERE number = new.number; END;
CREATE TRIGGER IF NOT EXISTS count_changed AFTER UPDATE OF state, step, preview_step ON jobs BEGIN
    UPDATE jobs SET changed = (SELECT max(changed) + 1 FROM jobs) WHERE number = new.number; END;
CREATE TABLE IF NOT EXISTS workers (
    name TEXT PRIMARY KEY, state TEXT NOT NULL, model TEXT, device TEXT, heartbeat REAL NOT NULL);
"""
"""``changed`` numbers the changes of all jobs in the order in which they were committed."""


@dataclass
class JobDatabase:
    """Connections to the file of the jobs, one for each thread.

    Args:
        durable: flush each change to the disk, so that an accepted job survives a power failure. Without it, a change
            survives the death of processes alone, which is enough for what can be done again.
    """

    file: Path
    durable: bool = False

    def __post_init__(self) -> None:
        self._local, self._lock = threading.local(), threading.Lock()
        self._all = list[tuple[threading.Thread, sqlite3.Connection]]()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.change() as db:
            found = db.execute("PRAGMA user_version").fetchone()[0]
            if found not in (0, SCHEMA):
                raise UserError(
                    f"{self.file} is of another version of stdit ({found}, not {SCHEMA}): move it away."
                )
        self.connection().executescript(_TABLES)
        self.connection().execute(f"PRAGMA user_version = {SCHEMA}")

    def connection(self) -> sqlite3.Connection:
        """Return the connection of this thread, for reading."""
        if not hasattr(self._local, "db"):
            try:
                db = sqlite3.connect(self.file, timeout=30, isolation_level=None, check_same_thread=False)
                db.execute("PRAGMA journal_mode = WAL")
            except sqlite3.Error as error:
                raise UserError(f"{self.file} cannot be opened ({error}): move it away.") from None
            db.execute(f"PRAGMA synchronous = {'FULL' if self.durable else 'NORMAL'}")
            db.row_factory = sqlite3.Row
            self._local.db = db
            with self._lock:
                for thread, old in self._all:
                    if not thread.is_alive():
                        old.close()
                alive = [one for one in self._all if one[0].is_alive()]
                self._all = [*alive, (threading.current_thread(), db)]
        connection: sqlite3.Connection = self._local.db
        return connection

    @contextmanager
    def change(self) -> Iterator[sqlite3.Connection]:
        """Yield a connection for one transaction that no other change comes between."""
        db = self.connection()
        db.execute("BEGIN IMMEDIATE")
        try:
            yield db
            db.commit()
        except BaseException:
            db.rollback()
            raise

    def close(self) -> None:
        """Close the connections of all threads, none of which may use them any more."""
        with self._lock:
            for _, db in self._all:
                db.close()
            self._all.clear()
        self._local = threading.local()
