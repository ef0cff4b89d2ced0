"""Server-sent events: what happens to the jobs, as it happens."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass, field
from typing import Any

from starlette.concurrency import run_in_threadpool

from stdit.serve.api.video_objects import video_object
from stdit.serve.queue.health import health
from stdit.serve.queue.jobs import JobStore

LOOK_SECONDS = 0.1
KEEP_ALIVE_SECONDS = 15.0
_MOST_WAITING = 200
"""Events that wait for a client that reads too slowly: above it the stream ends, and the client asks anew."""


@dataclass
class EventStream:
    """Tells all clients that listen what changes in the jobs; looks at the file once for all of them."""

    store: JobStore
    keep_days: float | None = None
    _clients: set[asyncio.Queue[str | None]] = field(default_factory=set)
    _task: asyncio.Task[None] | None = None
    _closing: bool = False

    def close(self) -> None:
        """End all streams, which would keep the server from ending."""
        self._closing = True
        for client in self._clients:
            client.put_nowait(None)

    async def listen(self, only: Collection[str] = (), until_over: bool = False) -> AsyncIterator[str]:
        """Yield events: first the state of the jobs that are not over, then each change.

        Args:
            only: names of jobs; empty: all of them.
            until_over: end when all of these are over.
        """
        queue: asyncio.Queue[str | None] = asyncio.Queue(_MOST_WAITING)
        self._clients.add(queue)
        left = set(only)
        try:
            for event in await run_in_threadpool(self._now, only):
                yield event
                left -= _over(event)
            if self._task is None or self._task.done():
                self._task = asyncio.create_task(self._look())
            while not (until_over and not left) and not self._closing:
                try:
                    told = await asyncio.wait_for(queue.get(), KEEP_ALIVE_SECONDS)
                except TimeoutError:
                    yield ": still here\n\n"
                    continue
                if told is None:
                    return
                if not only or any(f'"{name}"' in told for name in only):
                    yield told
                    left -= _over(told)
        finally:
            self._clients.discard(queue)

    def _now(self, only: Collection[str]) -> list[str]:
        if only:
            jobs = [job for name in only if (job := self.store.get(name)) is not None]
        else:
            jobs = [
                job
                for state in ("in_progress", "queued")
                for job in self.store.list_jobs(100, newest_first=False, state=state)
            ]
        events = [_event("workers", health(self.store).model_dump())]
        for job in jobs:
            events.append(_event("video", video_object(job, self.store, self.keep_days).model_dump()))
            if (image := self.store.preview(job.id)) is not None:
                events.append(_preview(job.id, job.preview_step, image))
        return events

    async def _look(self) -> None:
        """Look for changes as long as somebody listens."""
        seen: dict[str, Any] = {}
        shown: dict[str, int | None] = {}
        since, version, workers = 0.0, -1, ""
        jobs = await run_in_threadpool(self.store.list_jobs, 1)
        since = max((job.changed for job in jobs), default=0.0)
        while self._clients and not self._closing:
            await asyncio.sleep(LOOK_SECONDS)
            found, since, version, workers = await run_in_threadpool(
                self._changes, seen, shown, since, version, workers
            )
            for event in found:
                for client in list(self._clients):
                    if client.full():
                        self._clients.discard(client)
                        while not client.empty():
                            client.get_nowait()
                        client.put_nowait(None)
                    else:
                        client.put_nowait(event)

    def _changes(
        self, seen: dict[str, Any], shown: dict[str, int | None], since: float, version: int, workers: str
    ) -> tuple[list[str], float, int, str]:
        events: list[str] = []
        jobs = self.store.changed_since(since)
        for job in jobs:
            key = (job.changed, job.state, job.step)
            if seen.get(job.id) != key:
                seen[job.id] = key
                events.append(_event("video", video_object(job, self.store, self.keep_days).model_dump()))
            if job.preview_step is not None and shown.get(job.id) != job.preview_step and not job.is_over:
                shown[job.id] = job.preview_step
                if (image := self.store.preview(job.id)) is not None:
                    events.append(_preview(job.id, job.preview_step, image))
            if job.is_over:
                shown.pop(job.id, None)
            since = max(since, job.changed)
        for name in [name for name, key in seen.items() if key[0] < since - 60]:
            del seen[name]
        now = health(self.store).model_dump()
        text = json.dumps(now)
        if text != workers:
            events.append(_event("workers", now))
        return events, since, version, text


def _event(name: str, data: Any) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def _preview(job_id: str, step: int | None, image: bytes) -> str:
    data = f"data:image/webp;base64,{base64.b64encode(image).decode()}"
    return _event("preview", {"id": job_id, "step": step, "image": data})


def _over(event: str) -> set[str]:
    """Return the job that an event says to be over, as a set."""
    if not event.startswith("event: video\n"):
        return set()
    found = json.loads(event.partition("data: ")[2])
    return {found["id"]} if found["status"] in ("completed", "failed", "cancelled") else set()
