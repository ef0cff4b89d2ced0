"""Health of the server, and its numbers for Prometheus."""

import time
from collections.abc import Iterator
from typing import Any, Literal

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector, CollectorRegistry
from pydantic import BaseModel

from stdit.serve.queue.job import RUNNING, WAITING
from stdit.serve.queue.jobs import JobStore

DEAD_SECONDS = 30.0
"""Without a heartbeat, after which a worker that is idle counts as dead."""


class WorkerObject(BaseModel):
    """A worker."""

    name: str
    state: Literal["starting", "idle", "busy", "dead"]
    model: str | None
    device: str | None

    @property
    def is_working(self) -> bool:
        """Whether it makes videos, or would."""
        return self.state in ("idle", "busy")


class HealthObject(BaseModel):
    """The state of the server."""

    status: Literal["ok", "starting", "degraded"]
    workers: list[WorkerObject]
    queued: int
    running: int


def health(store: JobStore) -> HealthObject:
    """Return the state of the server: ok as soon as a worker works."""
    counts, workers = store.counts(), worker_objects(store)
    working = [one for one in workers if one.is_working]
    starting = [one for one in workers if one.state == "starting"]
    status: Any = "ok" if working else "starting" if starting else "degraded"
    return HealthObject(status=status, workers=workers, queued=counts[WAITING], running=counts[RUNNING])


def worker_objects(store: JobStore) -> list[WorkerObject]:
    """Return the workers of the server."""
    now, workers = time.time(), []
    for one in store.workers():
        silent = one["state"] == "idle" and now - one["heartbeat"] > DEAD_SECONDS
        workers.append(
            WorkerObject(
                name=one["name"].rpartition("-")[0],
                state="dead" if silent else one["state"],
                model=one["model"],
                device=one["device"],
            )
        )
    return workers


class _Jobs(Collector):
    """Numbers of jobs and workers, read when Prometheus asks."""

    def __init__(self, store: JobStore) -> None:
        self.store = store

    def collect(self) -> Iterator[GaugeMetricFamily]:
        jobs = GaugeMetricFamily("stdit_jobs", "Jobs by state", labels=["state"])
        for state, count in self.store.counts().items():
            jobs.add_metric([state], count)
        yield jobs
        workers = GaugeMetricFamily("stdit_workers", "Workers by state", labels=["state"])
        states: list[str] = [one.state for one in worker_objects(self.store)]
        for state in ("starting", "idle", "busy", "dead"):
            workers.add_metric([state], states.count(state))
        yield workers
        videos, seconds = self.store.completed_totals()
        yield GaugeMetricFamily("stdit_kept_videos", "Completed videos that are not deleted", value=videos)
        yield GaugeMetricFamily(
            "stdit_kept_video_seconds",
            "Seconds that the completed videos that are not deleted took, by their share of batches",
            value=seconds,
        )


def metrics_registry(store: JobStore) -> CollectorRegistry:
    """Return what Prometheus reads."""
    registry = CollectorRegistry()
    registry.register(_Jobs(store))
    return registry
