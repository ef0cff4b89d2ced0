"""Numbers of the server: time left, and what Prometheus reads."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from stdit.serve.api.video_objects import video_object
from stdit.serve.queue.health import metrics_registry
from stdit.serve.queue.job import NewJob
from stdit.serve.queue.jobs import JobStore

FACTS = {"prompt": "a ball", "seed": 1, "width": 64, "height": 64, "num_frames": 8, "fps": 8, "warnings": []}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    """A store with a video whose unit of work took 3 seconds, and five that wait."""
    store = JobStore(tmp_path / "jobs.sqlite")
    for number in range(6):
        new = NewJob(id=f"video_{number}", client="a", body={}, model="m", batch="b", work=1.0, facts=FACTS)
        store.submit(new)
    for worker in ("worker-0-a", "worker-1-a"):
        store.register(worker)
    store.claim("worker-0-a", 1)
    store.complete("worker-0-a", "video_0", "video.mp4", size=10, seconds=3.0)
    yield store
    store.close()


def test_the_work_ahead_is_divided_among_the_workers(store: JobStore) -> None:
    def seconds_left() -> float | None:
        job = store.get("video_5")
        assert job is not None
        return video_object(job, store).eta_seconds

    assert seconds_left() == 15  # four before it, and its own
    store.heartbeat("worker-1-a", "idle")
    assert seconds_left() == 9
    store.release()  # all workers are gone
    assert seconds_left() == 15


def test_prometheus_reads_gauges_of_what_is_kept(store: JobStore) -> None:
    registry = metrics_registry(store)
    text = generate_latest(registry).decode()
    assert "# TYPE stdit_kept_videos gauge\nstdit_kept_videos 1.0" in text
    assert "stdit_kept_video_seconds 3.0" in text and "counter" not in text
    store.delete("video_0")
    assert "stdit_kept_videos 0.0" in generate_latest(registry).decode()
