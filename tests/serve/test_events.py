"""The streams of events: nothing is lost, and each of them ends."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from stdit.serve.api import events
from stdit.serve.api.events import EventStream
from stdit.serve.errors import RequestError
from stdit.serve.queue.job import NewJob
from stdit.serve.queue.jobs import JobStore
from tests.waiting import seconds_left

FACTS = {"prompt": "a ball", "seed": 1, "width": 64, "height": 64, "num_frames": 8, "fps": 8, "warnings": []}
Told = tuple[str, dict[str, Any]]


def job(number: int) -> NewJob:
    return NewJob(
        id=f"video_{number}", client="here", body={}, model="bundled", batch="a", work=1.0, facts=FACTS
    )


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    store = JobStore(tmp_path / "jobs.sqlite")
    store.register("w")
    yield store
    store.close()


def parsed(event: str) -> Told:
    name, data = event.strip().split("\n")
    return name.removeprefix("event: "), json.loads(data.removeprefix("data: "))


async def next_of(stream: AsyncIterator[str], *names: str) -> Told:
    """Return the next event of one of these names."""
    while True:
        found = parsed(await asyncio.wait_for(anext(stream), seconds_left()))
        if found[0] in names:
            return found


def test_the_stream_of_a_video_ends_when_it_is_deleted(store: JobStore) -> None:
    async def check() -> None:
        store.submit(job(0))
        stream = EventStream(store).listen(["video_0"], until_over=True)
        assert (await next_of(stream, "video"))[1]["status"] == "queued"
        store.delete("video_0")
        assert await next_of(stream, "video", "deleted") == ("deleted", {"id": "video_0"})
        with pytest.raises(StopAsyncIteration):
            await asyncio.wait_for(anext(stream), seconds_left())
        later = EventStream(store).listen(["video_0"], until_over=True)
        assert [parsed(one)[0] async for one in later] == ["workers", "deleted"]

    asyncio.run(check())


def test_no_change_is_lost_or_told_out_of_order(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    now = EventStream._now

    def slow_now(self: EventStream, only: Any) -> Any:
        """Change jobs after the state was read and before it is sent."""
        found = now(self, only)
        store.submit(job(1))
        store.claim("w", 1)
        store.progress("w", ["video_0"], 1, 4)
        return found

    async def check() -> None:
        store.submit(job(0))
        stream = EventStream(store).listen()
        told = [(await next_of(stream, "video"))[1] for _ in range(3)]
        assert [(one["id"], one["step"]) for one in told[:1]] == [("video_0", 0)]
        assert {(one["id"], one["step"]) for one in told[1:]} == {("video_1", 0), ("video_0", 1)}

    monkeypatch.setattr(EventStream, "_now", slow_now)
    asyncio.run(check())


def test_a_waiting_video_is_told_its_new_position(store: JobStore) -> None:
    async def check() -> None:
        for number in range(3):
            store.submit(job(number))
        stream = EventStream(store).listen()
        positions = [(await next_of(stream, "video"))[1]["position"] for _ in range(3)]
        assert positions == [0, 1, 2]
        store.claim("w", 1)
        told = dict[str, int | None]()
        while len(told) < 3:
            video = (await next_of(stream, "video"))[1]
            told[video["id"]] = video["position"]
        assert told == {"video_0": None, "video_1": 0, "video_2": 1}

    asyncio.run(check())


def test_a_failed_look_is_logged_and_the_streams_go_on(
    store: JobStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    changes, failures = EventStream._changes, iter([True, True])

    def failing(self: EventStream, seen: Any) -> Any:
        if next(failures, False):
            raise OSError("the disk is full")
        return changes(self, seen)

    async def check() -> None:
        stream = EventStream(store).listen()
        await next_of(stream, "workers")
        store.submit(job(0))
        assert (await next_of(stream, "video"))[1]["id"] == "video_0"

    monkeypatch.setattr(EventStream, "_changes", failing)
    monkeypatch.setattr(events, "_PAUSE_SECONDS", 0.01)
    asyncio.run(check())
    assert caplog.text.count("the changes of the videos could not be read") == 2


def test_a_client_that_reads_nothing_is_dropped(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        streams = EventStream(store)

        async def read_one() -> None:
            async for _ in streams.listen():
                await asyncio.Event().wait()  # as a send to it that never returns

        slow, fast = asyncio.create_task(read_one()), streams.listen()
        await next_of(fast, "workers")
        for number in range(8):
            store.submit(job(number))
            assert (await next_of(fast, "video"))[1]["id"] == f"video_{number}"
        await asyncio.wait([slow], timeout=seconds_left())
        assert slow.cancelled() and len(streams._clients) == 1

    monkeypatch.setattr(events, "_MOST_WAITING", 2)
    asyncio.run(check())


def test_many_changes_at_once_drop_nobody(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        stream = EventStream(store).listen()
        await next_of(stream, "workers")
        for number in range(20):
            store.submit(job(number))
        told = [(await next_of(stream, "video"))[1]["id"] for _ in range(20)]
        assert told == [f"video_{number}" for number in range(20)]

    monkeypatch.setattr(events, "_MOST_WAITING", 2)
    asyncio.run(check())


def test_only_so_many_streams_are_open(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        streams = EventStream(store)
        opened = [streams.listen() for _ in range(2)]
        for one in opened:
            await anext(one)
        with pytest.raises(RequestError, match="2 streams of events are open, of at most 2") as refused:
            streams.listen()
        assert refused.value.status == 503
        await opened[0].aclose()  # type: ignore[attr-defined]
        await anext(streams.listen())

    monkeypatch.setattr(events, "MAX_STREAMS", 2)
    asyncio.run(check())


def test_too_many_streams_are_refused_in_words(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MAX_STREAMS", 0)
    answer = client.get("/v1/events")
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "too_many_streams"


def test_closing_ends_streams_that_read_and_those_that_do_not(store: JobStore) -> None:
    async def check() -> None:
        streams = EventStream(store)

        async def read(stuck: bool) -> None:
            async for _ in streams.listen():
                if stuck:
                    await asyncio.Event().wait()

        tasks = [asyncio.create_task(read(stuck)) for stuck in (False, True)]
        while len(streams._clients) < 2 or streams._task is None:
            await asyncio.sleep(0)
        await asyncio.wait_for(streams.wait_closed(), seconds_left())
        _, left = await asyncio.wait(tasks, timeout=seconds_left())
        assert not left and not tasks[0].cancelled() and tasks[1].cancelled()

    asyncio.run(check())
