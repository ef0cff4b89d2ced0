"""Server-sent events: what happens to the jobs, as it happens."""

import asyncio
import base64
import json
import logging
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.concurrency import run_in_threadpool

from stdit.serve.api.video_objects import video_object
from stdit.serve.errors import RequestError
from stdit.serve.queue.health import health
from stdit.serve.queue.job import DELETED, RUNNING, WAITING, Job
from stdit.serve.queue.jobs import JobStore

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.1
KEEP_ALIVE_SECONDS = 15.0
MAX_STREAMS, MAX_STREAMS_OF_CLIENT = 200, 50
"""Open streams of all clients together, and of one."""
_MOST_WAITING = 200
"""Events that wait for a client that reads too slowly: above it the stream ends, and the client asks again."""
_MOST_POSITIONS = 50
"""Waiting jobs whose position is sent whenever it changes; those behind them learn it later."""
_PAUSE_SECONDS = 1.0
"""After a look at the file that failed."""
_CLOSING_SECONDS = 1.0
"""For a client to take what is being sent to it when the server ends."""


@dataclass(frozen=True)
class _Event:
    """An event, and which job it is about."""

    name: str
    data: Any
    job: str | None = None
    changed: int = 0
    """`Job.changed` when it was read."""
    is_over: bool = False
    """Whether nothing more happens to the job."""

    def __str__(self) -> str:
        return f"event: {self.name}\ndata: {json.dumps(self.data)}\n\n"


@dataclass(eq=False)
class _Client:
    """Somebody who listens."""

    address: str
    task: asyncio.Task[Any]
    """Sends the events; it waits in vain if the client reads nothing."""
    waiting: asyncio.Queue[_Event | None] = field(default_factory=asyncio.Queue)
    """None: the stream ends."""


@dataclass
class _Seen:
    """What all clients were told."""

    changes: int
    """Changes of jobs up to this one."""
    previews: dict[str, int] = field(default_factory=dict)
    """Step of the newest preview of each job."""
    workers: dict[str, Any] | None = None
    running: set[str] = field(default_factory=set)
    """Jobs that are being made."""


@dataclass
class EventStream:
    """Changes of the jobs, for all clients that listen; the file is read once for all of them."""

    store: JobStore
    keep_days: float | None = None
    _clients: set[_Client] = field(default_factory=set)
    _task: asyncio.Task[None] | None = None
    _closing: bool = False

    def close(self) -> None:
        """End all streams, which would keep the server from ending."""
        self._closing = True
        for client in self._clients:
            client.waiting.put_nowait(None)
            asyncio.get_running_loop().call_later(_CLOSING_SECONDS, client.task.cancel)

    async def wait_closed(self) -> None:
        """End all streams, and wait until nothing reads the jobs any more."""
        self.close()
        if self._task is not None and not self._task.done():
            await asyncio.wait([self._task])

    def listen(
        self, only: Collection[str] = (), until_over: bool = False, address: str = ""
    ) -> AsyncIterator[str]:
        """Return events: first the state of the jobs that are not over, then each change.

        Args:
            only: names of jobs; empty: all of them.
            until_over: end when all of these are over or deleted.
            address: of the client.

        Raises:
            RequestError: if too many streams are open.
        """
        own = sum(client.address == address for client in self._clients)
        for count, most in ((len(self._clients), MAX_STREAMS), (own, MAX_STREAMS_OF_CLIENT)):
            if count >= most:
                raise RequestError(
                    f"{count} streams of events are open, of at most {most}: close some, or ask for "
                    "GET /v1/videos/{id} every few seconds.",
                    status=503,
                    code="too_many_streams",
                )
        return self._listen(frozenset(only), until_over, address)

    async def _listen(self, only: frozenset[str], until_over: bool, address: str) -> AsyncIterator[str]:
        task = asyncio.current_task()
        assert task is not None
        client = _Client(address, task)
        self._clients.add(client)
        left = set(only)
        try:
            await self._start()
            state = await run_in_threadpool(
                self._now, only
            )  # later than the start: no change is lost between
            told = {event.job: event.changed for event in state}
            for event in state:
                yield str(event)
                left -= {event.job} if event.is_over else set()
            while not (until_over and not left) and not self._closing:
                try:
                    new = await asyncio.wait_for(client.waiting.get(), KEEP_ALIVE_SECONDS)
                except TimeoutError:
                    yield ": still here\n\n"
                    continue
                if new is None:
                    return
                is_new = new.job is None or new.changed > told.get(new.job, 0)
                if is_new and (not only or new.job in only):
                    yield str(new)
                    left -= {new.job} if new.is_over else set()
        finally:
            self._clients.discard(client)

    async def _start(self) -> None:
        """Look for changes from now on, unless that is done already."""
        if self._task is None or self._task.done():
            changes = await run_in_threadpool(self.store.change_count)
            if self._task is None or self._task.done():  # no other client was faster
                self._task = asyncio.create_task(self._look(_Seen(changes)))

    def _now(self, only: Collection[str]) -> list[_Event]:
        events = [_Event("workers", health(self.store).model_dump())]
        if only:
            found = {name: self.store.get(name) for name in only}
            events += [_deleted(name) for name, job in found.items() if job is None]
            jobs = [job for job in found.values() if job is not None]
        else:
            jobs = [
                job
                for state in ("in_progress", "queued")
                for job in self.store.list_jobs(100, newest_first=False, state=state)
            ]
        for job in jobs:
            events.append(self._video(job))
            events += self._preview(job)
        return events

    async def _look(self, seen: _Seen) -> None:
        """Look for changes as long as somebody listens."""
        while self._clients and not self._closing:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                found = await run_in_threadpool(self._changes, seen)
            except Exception:  # such as a disk that is full for a while: the streams go on
                if not self._closing:
                    logger.exception("the changes of the videos could not be read")
                    await asyncio.sleep(_PAUSE_SECONDS)
                continue
            for client in list(self._clients):
                if client.waiting.qsize() > _MOST_WAITING:
                    self._clients.discard(client)
                    client.task.cancel()
                else:
                    for event in found:
                        client.waiting.put_nowait(event)

    def _changes(self, seen: _Seen) -> list[_Event]:
        """Return what is new, and note it."""
        jobs = self.store.changed_since(seen.changes)
        events, previews = list[_Event](), dict(seen.previews)
        for job in jobs:
            if job.state == DELETED:
                events.append(_deleted(job.id, job.changed))
            else:
                events.append(self._video(job))
            if job.is_over or job.preview_step is None:
                previews.pop(job.id, None)
            elif previews.get(job.id) != job.preview_step:
                previews[job.id] = job.preview_step
                events += self._preview(job)
        running = {job.id for job in jobs if job.state == RUNNING}
        if running - seen.running or any(job.is_over for job in jobs):
            events += self._positions(jobs[-1].changed, {job.id for job in jobs})
        workers = health(self.store).model_dump()
        if workers != seen.workers:
            events.append(_Event("workers", workers))
        seen.changes = max((job.changed for job in jobs), default=seen.changes)
        seen.previews, seen.workers = previews, workers
        seen.running = (seen.running - {job.id for job in jobs}) | running
        return events

    def _positions(self, changed: int, told: Collection[str]) -> list[_Event]:
        """Return the first waiting jobs but for those that are told already: each is nearer to its turn now."""
        waiting = self.store.list_jobs(_MOST_POSITIONS, newest_first=False, state=WAITING)
        events = [self._video(job) for job in waiting if job.id not in told]
        return [replace(event, changed=changed) for event in events]

    def _video(self, job: Job) -> _Event:
        data = video_object(job, self.store, self.keep_days).model_dump()
        return _Event("video", data, job.id, job.changed, job.is_over)

    def _preview(self, job: Job) -> list[_Event]:
        """Return the newest preview of a job, if it has one."""
        image = self.store.preview(job.id)
        if image is None:
            return []
        shown = f"data:image/webp;base64,{base64.b64encode(image).decode()}"
        data = {"id": job.id, "step": job.preview_step, "image": shown}
        return [_Event("preview", data, job.id, job.changed)]


def _deleted(job_id: str, changed: int = 0) -> _Event:
    return _Event(DELETED, {"id": job_id}, job_id, changed, is_over=True)
