"""A job, a video that was asked for, as `JobStore` keeps it. Imports no torch."""

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

WAITING, RUNNING, COMPLETED, FAILED, CANCELLED = "queued", "in_progress", "completed", "failed", "cancelled"
DELETED = "deleted"
"""State of a job that is kept for a while, so that all who watch it learn that it is gone."""
STATES = (WAITING, RUNNING, COMPLETED, FAILED, CANCELLED)


@dataclass(frozen=True)
class Job:
    """A video that was asked for."""

    number: int
    """Place in the order in which jobs came."""
    id: str
    client: str
    body: dict[str, Any]
    """What was asked, complete: with the same model, the same body makes the same video."""
    model: str
    facts: dict[str, Any]
    """What is known of the video before it is made: size, length, warnings."""
    state: str
    step: int
    steps: int
    preview_step: int | None
    created: float
    started: float | None
    finished: float | None
    changed: int
    """Number of its last change among those of all jobs."""
    file: str | None
    """Name of the video in the folder of videos."""
    error: str | None
    param: str | None
    batch_size: int | None
    crashes: int
    work: float

    @classmethod
    def of_row(cls, row: sqlite3.Row) -> "Job":
        """Return the job of a row of the table of jobs."""
        values = {one.name: row[one.name] for one in fields(cls)}
        return cls(**values | {"body": json.loads(row["body"]), "facts": json.loads(row["facts"])})

    @property
    def is_over(self) -> bool:
        """Whether nothing more happens to it."""
        return self.state not in (WAITING, RUNNING)


@dataclass(frozen=True)
class NewJob:
    """A job to be accepted."""

    id: str
    client: str
    body: Mapping[str, Any]
    model: str
    batch: str
    """Jobs of which this is equal can be made in one batch."""
    work: float
    """Pixels x model calls, by which the time is estimated."""
    facts: Mapping[str, Any]
    request_hash: str = ""
    """Hash of what the client sent."""
    key: str | None = None
    """Idempotency key: a second job of the same client with it is the first one."""
