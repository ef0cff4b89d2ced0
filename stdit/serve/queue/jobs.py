"""Jobs: the videos that were asked for, in an SQLite file that server and workers share. Imports no torch.

A job that was accepted is finished exactly once or reported as failed, whatever is killed. All that is known of it is
in the file, and each change is one transaction:

- A worker claims waiting jobs under a name of its own. Updates of jobs that it no longer owns are ignored.
- If a worker ends, its jobs wait again, with the same seed. One whose workers crashed shares a batch with half as
  many others, and fails after `MAX_CRASHES_ALONE` crashes on its own.
- A video has the name of its job, and is written before the job is completed: a worker that finds it does not make
  it again.
"""

import json
import sqlite3
import time
from collections.abc import Sequence
from typing import Any

from stdit.errors import UserError
from stdit.serve.queue.job import STATES, Job, NewJob
from stdit.serve.queue.job_database import JobDatabase

MAX_CRASHES_ALONE = 3
"""Crashes of workers that made just this video, after which it fails."""
_DELETE = "UPDATE jobs SET state = 'deleted', preview = NULL, key = NULL, finished = ?"


class KeyReusedError(UserError):
    """An idempotency key that came with another body before."""


class QueueFullError(UserError):
    """No more jobs may wait."""


class JobStore(JobDatabase):
    """The jobs: what the server and its workers do with them. Any threads and processes may use the file."""

    def submit(self, new: NewJob, max_waiting: int = 1000, max_waiting_per_client: int = 1000) -> Job:
        """Accept a job; return it, or the one that the same client sent with this key before.

        Raises:
            KeyReusedError: the key came with another body.
            QueueFullError: too many jobs are waiting.
        """
        with self.change() as db:
            if new.key is not None:
                found = self.find_by_key(new.client, new.key, new.request_hash)
                if found is not None:
                    return found
            waiting = "SELECT count(*) FROM jobs WHERE state IN ('queued', 'in_progress')"
            of_client = db.execute(f"{waiting} AND client = ?", (new.client,)).fetchone()[0]
            if of_client >= max_waiting_per_client:
                raise QueueFullError(
                    f"{of_client} videos of yours are waiting, of at most {max_waiting_per_client}: wait until some "
                    "are finished, or cancel some."
                )
            if (total := db.execute(waiting).fetchone()[0]) >= max_waiting:
                raise QueueFullError(
                    f"{total} videos are waiting, of at most {max_waiting}: try again later."
                )
            values = (
                new.id,
                new.client,
                new.key,
                new.request_hash,
                json.dumps(new.body),
                new.model,
                new.batch,
                new.work,
            )
            db.execute(
                "INSERT INTO jobs (id, client, key, request_hash, body, model, batch, work, facts, state, created)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 'queued', ?)",
                (*values, json.dumps(new.facts), time.time()),
            )
            return Job.of_row(db.execute("SELECT * FROM jobs WHERE id = ?", (new.id,)).fetchone())

    def get(self, job_id: str) -> Job | None:
        """Return a job; None if there is none of that name."""
        row = (
            self.connection()
            .execute("SELECT * FROM jobs WHERE id = ? AND state != 'deleted'", (job_id,))
            .fetchone()
        )
        return None if row is None else Job.of_row(row)

    def preview(self, job_id: str) -> bytes | None:
        """Return the newest preview of a job, an animated WebP."""
        row = self.connection().execute("SELECT preview FROM jobs WHERE id = ?", (job_id,)).fetchone()
        return None if row is None else row["preview"]

    def list_jobs(
        self, limit: int, after: int | None = None, newest_first: bool = True, state: str | None = None
    ) -> list[Job]:
        """Return jobs in the order in which they came, or the newest first.

        Args:
            after: number of the job before the first of them.
        """
        order, compare = ("DESC", "<") if newest_first else ("ASC", ">")
        conditions, values = ["state != 'deleted'"], list[Any]()
        if after is not None:
            conditions.append(f"number {compare} ?")
            values.append(after)
        if state is not None:
            conditions.append("state = ?")
            values.append(state)
        rows = self.connection().execute(
            f"SELECT * FROM jobs WHERE {' AND '.join(conditions)} ORDER BY number {order} LIMIT ?",
            (*values, limit),
        )
        return [Job.of_row(row) for row in rows]

    def change_count(self) -> int:
        """Return the number of the last change."""
        row = self.connection().execute("SELECT coalesce(max(changed), 0) AS last FROM jobs").fetchone()
        return int(row["last"])

    def changed_since(self, count: int) -> list[Job]:
        """Return the jobs that have changed after the change of this number; deleted ones have the state deleted."""
        rows = self.connection().execute("SELECT * FROM jobs WHERE changed > ? ORDER BY changed", (count,))
        return [Job.of_row(row) for row in rows]

    def ahead(self, number: int) -> tuple[int, float]:
        """Return how many jobs wait before the one of this number, and the work of these and of the running ones."""
        row = (
            self.connection()
            .execute(
                "SELECT total(state = 'queued' AND number < ?) AS count, total(CASE WHEN state = 'in_progress' THEN"
                " work * (1 - 1.0 * step / max(1, steps)) WHEN number < ? THEN work ELSE 0 END) AS work"
                " FROM jobs WHERE state IN ('queued', 'in_progress')",
                (number, number),
            )
            .fetchone()
        )
        return int(row["count"]), float(row["work"])

    def seconds_per_work(self, model: str) -> float | None:
        """Return how long a unit of work took in the last videos of a model; None if there were none."""
        row = (
            self.connection()
            .execute(
                "SELECT sum(seconds) / sum(work) AS rate FROM (SELECT seconds, work FROM jobs WHERE model = ? AND"
                " state = 'completed' AND seconds > 0 ORDER BY number DESC LIMIT 20)",
                (model,),
            )
            .fetchone()
        )
        return None if row["rate"] is None else float(row["rate"])

    def counts(self) -> dict[str, int]:
        """Return how many jobs are in each state."""
        rows = self.connection().execute(
            "SELECT state, count(*) AS count FROM jobs WHERE state != 'deleted' GROUP BY state"
        )
        return dict.fromkeys(STATES, 0) | {row["state"]: row["count"] for row in rows}

    def completed_totals(self) -> tuple[int, float]:
        """Return how many videos were completed, and the seconds that they took."""
        row = (
            self.connection()
            .execute(
                "SELECT count(*) AS count, total(seconds) AS seconds FROM jobs WHERE state = 'completed'"
            )
            .fetchone()
        )
        return int(row["count"]), float(row["seconds"])

    def cancel(self, job_id: str) -> Job | None:
        """Cancel a job unless it is over; its worker notices at its next step. Return it."""
        with self.change() as db:
            db.execute(
                "UPDATE jobs SET state = 'cancelled', preview = NULL, finished = ? WHERE id = ? AND state IN"
                " ('queued', 'in_progress')",
                (time.time(), job_id),
            )
        return self.get(job_id)

    def delete(self, job_id: str) -> str | None:
        """Forget a job, and return the name of its video, if it has one; a worker that makes it finds it no more."""
        with self.change() as db:
            row = db.execute("SELECT file FROM jobs WHERE id = ?", (job_id,)).fetchone()
            db.execute(f"{_DELETE} WHERE id = ?", (time.time(), job_id))
        return None if row is None else row["file"]

    def delete_file(self, file: str) -> None:
        """Forget the job of a video that was removed, by its name in the folder of videos."""
        with self.change() as db:
            db.execute(f"{_DELETE} WHERE file = ? AND state != 'deleted'", (time.time(), file))

    def purge(self, seconds: float) -> None:
        """Remove the rows of jobs that were deleted longer ago than this.

        The newest change stays: from its number on the next ones are counted.
        """
        with self.change() as db:
            db.execute(
                "DELETE FROM jobs WHERE state = 'deleted' AND finished < ? AND changed < (SELECT max(changed) FROM"
                " jobs)",
                (time.time() - seconds,),
            )

    def expired(self, keep_days: float | None, keep_gib: float | None) -> list[Job]:
        """Return the jobs that are over and too old, or whose videos are too large with all newer ones."""
        found = dict[str, Job]()
        db = self.connection()
        if keep_days is not None:
            rows = db.execute(
                "SELECT * FROM jobs WHERE state != 'deleted' AND finished < ?",
                (time.time() - keep_days * 86400,),
            )
            found |= {row["id"]: Job.of_row(row) for row in rows}
        if keep_gib is not None:
            rows = db.execute(
                "SELECT * FROM (SELECT *, sum(bytes) OVER (ORDER BY number DESC) AS until FROM jobs WHERE bytes IS"
                " NOT NULL AND state != 'deleted') WHERE until > ?",
                (keep_gib * 2**30,),
            )
            found |= {row["id"]: Job.of_row(row) for row in rows}
        return list(found.values())

    def find_by_key(self, client: str, key: str, request_hash: str) -> Job | None:
        """Return the job that a client sent with an idempotency key; None if there is none.

        Args:
            request_hash: of what the client sends now.

        Raises:
            KeyReusedError: the key came with another body.
        """
        query = "SELECT * FROM jobs WHERE client = ? AND key = ?"
        row = self.connection().execute(query, (client, key)).fetchone()
        if row is not None and row["request_hash"] != request_hash:
            raise KeyReusedError(
                f"Idempotency-Key = {key:.80}: came with another request before: use a new one."
            )
        return None if row is None else Job.of_row(row)

    def claim(self, worker: str, batch_size: int) -> list[Job]:
        """Give a worker the oldest waiting job, and others that fit into its batch."""
        with self.change() as db:
            if not db.execute("SELECT 1 FROM workers WHERE name = ?", (worker,)).fetchone():
                return []  # it was given up, and nobody would release what it claims
            first = db.execute("SELECT * FROM jobs WHERE state = 'queued' ORDER BY number LIMIT 1").fetchone()
            if first is None:
                return []
            rows = db.execute(
                "SELECT * FROM jobs WHERE state = 'queued' AND batch = ? AND crashes <= ? ORDER BY number LIMIT ?",
                (first["batch"], first["crashes"], max(1, batch_size >> first["crashes"])),
            ).fetchall()
            now = time.time()
            for row in rows:
                db.execute(
                    "UPDATE jobs SET state = 'in_progress', worker = ?, batch_size = ?, step = 0, steps = 0,"
                    " started = ? WHERE id = ?",
                    (worker, len(rows), now, row["id"]),
                )
            self._beat(db, worker, "busy", now)
            ids = [row["id"] for row in rows]
            return [
                Job.of_row(db.execute("SELECT * FROM jobs WHERE id = ?", (one,)).fetchone()) for one in ids
            ]

    def progress(
        self, worker: str, job_ids: Sequence[str], step: int, steps: int, previews: Sequence[bytes] = ()
    ) -> set[str]:
        """Record how far a worker's jobs are; return those that are still its own."""
        now = time.time()
        with self.change() as db:
            self._beat(db, worker, "busy", now)
            for place, job_id in enumerate(job_ids):
                db.execute(
                    "UPDATE jobs SET step = ?, steps = ?, preview = coalesce(?, preview), preview_step ="
                    " coalesce(?, preview_step) WHERE id = ? AND worker = ? AND state = 'in_progress'",
                    (
                        step,
                        steps,
                        *((previews[place], step) if previews else (None, None)),
                        job_id,
                        worker,
                    ),
                )
            rows = db.execute("SELECT id FROM jobs WHERE worker = ? AND state = 'in_progress'", (worker,))
            return {row["id"] for row in rows} & set(job_ids)

    def complete(self, worker: str, job_id: str, file: str, size: int, seconds: float) -> bool:
        """Record the video of a worker's job; return whether the job was still its own.

        Args:
            size: bytes of the video.
            seconds: that it took, its share of its batch.
        """
        return self._end(
            worker,
            job_id,
            "state = 'completed', step = steps, file = ?, bytes = ?, seconds = ?",
            file,
            size,
            seconds,
        )

    def fail(self, worker: str, job_id: str, message: str, param: str | None = None) -> bool:
        """Record why a worker's job failed; return whether it was still its own."""
        return self._end(worker, job_id, "state = 'failed', error = ?, param = ?", message, param)

    def _end(self, worker: str, job_id: str, change: str, *values: Any) -> bool:
        with self.change() as db:
            done = db.execute(
                f"UPDATE jobs SET {change}, preview = NULL, finished = ? WHERE id = ? AND worker = ? AND"
                " state = 'in_progress'",
                (*values, time.time(), job_id, worker),
            )
            return done.rowcount == 1

    def release(self, worker: str | None = None, crashed: bool = False, reason: str = "") -> list[str]:
        """Let the jobs of a worker that has ended wait again; return those that fail instead.

        Args:
            worker: None: all workers.
            crashed: it did not end because the server asked for it, so one of its jobs may be the cause.
        """
        failed = []
        with self.change() as db:
            now = time.time()
            rows = db.execute(
                "SELECT * FROM jobs WHERE state = 'in_progress' AND (? IS NULL OR worker = ?)",
                (worker, worker),
            ).fetchall()
            for row in rows:
                alone = row["crashes_alone"] + int(crashed and row["batch_size"] == 1)
                if alone >= MAX_CRASHES_ALONE:
                    failed.append(row["id"])
                    db.execute(
                        "UPDATE jobs SET state = 'failed', error = ?, preview = NULL, finished = ? WHERE id ="
                        " ?",
                        (
                            f"its worker ended {alone} times while it made this video alone ({reason}): ask for "
                            "fewer frames or a smaller size, or read the server's output",
                            *(now, row["id"]),
                        ),
                    )
                else:
                    db.execute(
                        "UPDATE jobs SET state = 'queued', worker = NULL, step = 0, preview = NULL, preview_step ="
                        " NULL, started = NULL, crashes = crashes + ?, crashes_alone = ? WHERE id = ?",
                        (int(crashed), alone, row["id"]),
                    )
            if worker is None:
                db.execute("DELETE FROM workers")
            else:
                db.execute("DELETE FROM workers WHERE name = ?", (worker,))
        return failed

    def register(self, worker: str) -> None:
        """Know a worker, which may claim jobs from now on, until it is released."""
        with self.change() as db:
            db.execute("INSERT INTO workers VALUES (?, 'starting', NULL, NULL, ?)", (worker, time.time()))

    def heartbeat(self, worker: str, state: str, model: str | None = None, device: str | None = None) -> None:
        """Record that a registered worker is alive."""
        with self.change() as db:
            self._beat(db, worker, state, time.time(), model, device)

    @staticmethod
    def _beat(
        db: sqlite3.Connection,
        worker: str,
        state: str,
        now: float,
        model: str | None = None,
        device: str | None = None,
    ) -> None:
        db.execute(
            "UPDATE workers SET state = ?, heartbeat = ?, model = coalesce(?, model), device = coalesce(?, device)"
            " WHERE name = ?",
            (state, now, model, device, worker),
        )

    def workers(self) -> list[dict[str, Any]]:
        """Return the workers, each with name, state (starting, idle, busy), model, device and heartbeat."""
        return [dict(row) for row in self.connection().execute("SELECT * FROM workers ORDER BY name")]
