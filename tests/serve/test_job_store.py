"""Jobs in SQLite: accepted ones are finished once or fail, whoever ends when."""

import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from stdit.errors import UserError
from stdit.serve.queue.job import CANCELLED, COMPLETED, FAILED, RUNNING, WAITING, NewJob
from stdit.serve.queue.jobs import MAX_CRASHES_ALONE, JobStore, KeyReusedError, QueueFullError
from tests.waiting import hang, wait_for


def job(number: int, batch: str = "a", **others: object) -> NewJob:
    values = {
        "client": "here",
        "body": {"prompt": f"p{number}"},
        "model": "bundled",
        "work": 1.0,
        "facts": {},
    }
    return NewJob(id=f"video_{number}", batch=batch, **values | others)


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    store = JobStore(tmp_path / "jobs.sqlite")
    for worker in ("w", "old", "new"):
        store.register(worker)
    return store


def test_a_job_is_claimed_with_those_of_its_batch_in_order(store: JobStore) -> None:
    for number, batch in enumerate("abaab"):
        store.submit(job(number, batch))
    assert [one.id for one in store.claim("w", 2)] == ["video_0", "video_2"]
    assert [one.id for one in store.claim("w", 8)] == ["video_1", "video_4"]
    assert [one.id for one in store.claim("w", 8)] == ["video_3"]
    assert store.claim("w", 8) == []


def test_the_same_key_is_the_same_job(store: JobStore) -> None:
    first = store.submit(job(0, key="k", request_hash="x"))
    assert store.submit(job(1, key="k", request_hash="x")).id == first.id
    assert store.submit(job(2, key="k", request_hash="x", client="elsewhere")).id == "video_2"
    with pytest.raises(KeyReusedError, match="came with another request"):
        store.submit(job(3, key="k", request_hash="y"))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files by /proc")
def test_threads_that_have_ended_hold_no_connection(store: JobStore) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(30):
        thread = threading.Thread(target=store.counts)
        thread.start()
        thread.join()
    assert len(os.listdir("/proc/self/fd")) < before + 10


def test_changes_are_counted_on_after_the_newest_ones_are_removed(store: JobStore) -> None:
    for number in range(3):
        store.submit(job(number))
    for number in (1, 2):
        store.delete(f"video_{number}")
    seen = store.change_count()
    store.purge(-1.0)
    store.submit(job(3))
    assert [one.id for one in store.changed_since(seen)] == ["video_3"]


def test_only_so_many_may_wait(store: JobStore) -> None:
    for number in range(3):
        store.submit(job(number), max_waiting=4, max_waiting_per_client=3)
    with pytest.raises(QueueFullError, match="3 videos of yours"):
        store.submit(job(3), max_waiting=4, max_waiting_per_client=3)
    store.submit(job(4, client="b"), max_waiting=4)
    with pytest.raises(QueueFullError, match="4 videos are waiting"):
        store.submit(job(5, client="c"), max_waiting=4)


def test_what_a_lost_worker_says_is_ignored(store: JobStore) -> None:
    store.submit(job(0))
    store.claim("old", 8)
    store.release("old", crashed=True)
    [again] = store.claim("new", 8)
    assert store.progress("old", ["video_0"], 1, 2) == set()
    assert not store.complete("old", "video_0", "x.mp4", 1, 1.0)
    assert not store.fail("old", "video_0", "no")
    assert again.crashes == 1 and store.progress("new", ["video_0"], 1, 2, [b"webp"]) == {"video_0"}
    assert store.preview("video_0") == b"webp"
    assert store.complete("new", "video_0", "x.mp4", 1, 1.0)
    found = store.get("video_0")
    assert found is not None and (found.state, found.file) == (COMPLETED, "x.mp4")
    assert store.preview("video_0") is None


def test_crashes_halve_the_batch_then_fail_the_job_that_was_alone(store: JobStore) -> None:
    for number in range(8):
        store.submit(job(number))
    sizes = []
    while (claimed := store.claim("w", 8)) and len(sizes) < 20:
        if claimed[0].id == "video_0":
            sizes.append(len(claimed))
            store.release("w", crashed=True, reason="signal 9")
            store.register("w")
        else:
            for one in claimed:
                store.complete("w", one.id, "x", 1, 1.0)
    assert sizes == [8, 4, 2, 1, 1, 1]
    states = {one.id: one.state for one in store.list_jobs(20)}
    assert states.pop("video_0") == FAILED
    assert set(states.values()) == {COMPLETED}
    found = store.get("video_0")
    assert found is not None and found.error is not None
    assert f"ended {MAX_CRASHES_ALONE} times" in found.error and "signal 9" in found.error


def test_a_server_that_ends_is_no_crash(store: JobStore) -> None:
    store.submit(job(0))
    for _ in range(10):
        [one] = store.claim("w", 1)
        assert one.crashes == 0
        store.release()
        store.register("w")
    assert store.get("video_0").state == WAITING  # type: ignore[union-attr]


def test_cancelled_and_deleted_jobs_are_no_longer_the_workers(store: JobStore) -> None:
    for number in range(3):
        store.submit(job(number))
    store.claim("w", 3)
    store.cancel("video_0")
    store.delete("video_1")
    assert store.progress("w", ["video_0", "video_1", "video_2"], 1, 2) == {"video_2"}
    assert not store.complete("w", "video_0", "x", 1, 1.0)
    assert store.get("video_0").state == CANCELLED and store.get("video_1") is None  # type: ignore[union-attr]
    assert store.cancel("video_0").state == CANCELLED  # type: ignore[union-attr]


def test_old_and_large_videos_expire(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        store.submit(job(number))
        store.claim("w", 1)
        store.complete("w", f"video_{number}", f"{number}.mp4", 2**29, 1.0)
    assert {one.id for one in store.expired(None, 1.0)} == {"video_0", "video_1"}
    assert store.expired(1.0, None) == []
    later = time.time() + 90_000
    monkeypatch.setattr(time, "time", lambda: later)
    assert len(store.expired(1.0, None)) == 4


def test_how_long_the_queue_is(store: JobStore) -> None:
    for number in range(4):
        store.submit(job(number, work=2.0))
    store.claim("w", 1)
    store.progress("w", ["video_0"], 1, 2)
    count, work = store.ahead(store.get("video_3").number)  # type: ignore[union-attr]
    assert (count, work) == (2, 1.0 + 4.0)
    assert store.seconds_per_work("bundled") is None
    store.complete("w", "video_0", "x", 1, 3.0)
    assert store.seconds_per_work("bundled") == 1.5


def test_another_version_is_refused(tmp_path: Path) -> None:
    import sqlite3

    with sqlite3.connect(tmp_path / "jobs.sqlite") as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(UserError, match="another version"):
        JobStore(tmp_path / "jobs.sqlite")
    (tmp_path / "broken.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(UserError, match="cannot be opened"):
        JobStore(tmp_path / "broken.sqlite")


def _work(file: Path) -> None:
    """Make up to 15 videos; then, at the latest, it is killed."""
    store, name, made = JobStore(file), f"worker-{os.getpid()}-{time.monotonic_ns()}", 0
    store.register(name)
    while made < 12:
        for one in wait_for(lambda: store.claim(name, 4), "jobs"):
            for step in range(3):
                store.progress(name, [one.id], step, 3, [b"x" * 100])
            store.complete(name, one.id, f"{one.id}.mp4", 1, 0.01)
            made += 1
    hang()


@pytest.mark.parametrize(
    "seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)
def test_workers_killed_at_random_lose_and_repeat_nothing(tmp_path: Path, seed: int) -> None:
    file, draw = tmp_path / "jobs.sqlite", random.Random(seed)
    store = JobStore(file)
    for number in range(60):
        store.submit(job(number, batch=draw.choice("ab")))
    context = multiprocessing.get_context("spawn")
    kills = 0
    while (done := store.counts()[COMPLETED]) < 60:
        worker = context.Process(target=_work, args=(file,), daemon=True)
        worker.start()
        enough = min(60, done + draw.randint(1, 10))
        wait_for(lambda enough=enough: store.counts()[COMPLETED] >= enough, f"{enough} videos", store.counts)
        os.kill(worker.pid or 0, signal.SIGKILL)
        worker.join()
        kills += 1
        store.release(crashed=False)
    assert kills > 2
    assert store.counts() == {WAITING: 0, RUNNING: 0, COMPLETED: 60, FAILED: 0, CANCELLED: 0}


def test_a_worker_that_was_given_up_claims_nothing(store: JobStore) -> None:
    """Its ranks may live a moment longer than their launcher."""
    store.submit(job(0))
    store.release("old", crashed=True)
    assert store.claim("old", 1) == []
    store.heartbeat("old", "busy")
    assert [one["name"] for one in store.workers()] == ["new", "w"]
    assert [one.id for one in store.claim("new", 1)] == ["video_0"]


def test_all_changes_are_seen_in_their_order(store: JobStore) -> None:
    seen, count = [], store.change_count()
    for number in range(3):
        store.submit(job(number))
    store.claim("w", 2)
    store.progress("w", ["video_0", "video_1"], 1, 2, [b"a", b"b"])
    store.delete("video_2")
    for changed in store.changed_since(count):
        assert changed.changed > count
        count = changed.changed
        seen.append((changed.id, changed.state))
    assert seen == [("video_0", "in_progress"), ("video_1", "in_progress"), ("video_2", "deleted")]
    assert store.changed_since(count) == [] and count == store.change_count()
    store.purge(0.0)
    assert store.get("video_2") is None and store.counts()["queued"] == 0


def test_a_change_that_fails_leaves_nothing_open(store: JobStore) -> None:
    with pytest.raises(ZeroDivisionError), store.change() as db:
        db.execute("DELETE FROM workers")
        raise ZeroDivisionError
    assert len(store.workers()) == 3
    store.close()
    assert len(store.workers()) == 3  # by a new connection
