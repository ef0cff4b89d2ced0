"""data.workers: auto, from cores and decoding time."""

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from stdit.data import workers
from stdit.data.assignment import assign_clips
from stdit.data.buckets import Bucket
from stdit.data.config import DataConfig
from stdit.data.decoding.decode import DecodeError
from stdit.data.decoding.media import Media
from stdit.data.manifest.clips import Clip
from stdit.data.plan import BatchPlan
from stdit.data.workers import count_workers

AUTO = DataConfig(workers="auto")


@pytest.fixture
def plan() -> BatchPlan:
    clips = [Clip(Media(f"/data/{index}.mp4"), "a clip", 16, 8.0, 32, 32) for index in range(20)]
    return BatchPlan(assign_clips(clips, [Bucket(16, 32, 32, 8, batch_size=10)]))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that decoding a clip moves by `seconds`; clips named in `damaged` cannot be decoded."""
    state = SimpleNamespace(now=0.0, seconds=0.0, decoded=[], damaged=[])

    def decode(clip: Clip, bucket: Bucket) -> None:
        state.now += state.seconds
        state.decoded.append(clip.media.location)
        if clip.media.location in state.damaged:
            raise DecodeError(clip.media, "damaged")

    monkeypatch.setattr(workers, "middle_window", decode)
    monkeypatch.setattr(workers, "time", SimpleNamespace(perf_counter=lambda: state.now, time=time.time))
    return state


@pytest.mark.parametrize(
    ("seconds", "cores", "parts", "expected"),
    [
        (0.025, 15, 1, 3),  # 0.25 s a batch, one every 0.1 s
        (0.025, 15, 2, 2),
        (0.001, 15, 1, 1),
        (1.0, 15, 1, 15),
        (1.0, 0, 1, 0),
        (1.0, -1, 1, 0),
    ],
)
def test_as_many_as_decode_in_time_but_no_more_than_cores(plan, clock, seconds, cores, parts, expected):
    clock.seconds = seconds
    assert count_workers(AUTO, plan, cores, parts) == expected
    assert count_workers(replace(AUTO, workers=7), plan, cores, parts) == 7


def test_the_measurement_is_short_and_passes_over_damaged_and_cached_clips(plan, clock):
    clock.seconds = 0.01
    count_workers(AUTO, plan, 15)
    assert len(clock.decoded) == workers.SAMPLE_CLIPS
    clock.damaged = clock.decoded[:1]
    clock.decoded = []
    assert count_workers(AUTO, plan, 15) == 1 and len(clock.decoded) == workers.SAMPLE_CLIPS + 1
    clock.damaged = [f"/data/{index}.mp4" for index in range(20)]
    assert count_workers(AUTO, plan, 15) == 0, "nothing can be measured"
    clock.decoded, clock.damaged = [], []
    assert count_workers(AUTO, plan, 15, known=lambda clip: True) == 0 and not clock.decoded
    clock.seconds = 5.0
    count_workers(AUTO, plan, 15)
    assert len(clock.decoded) == 1


def test_processes_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert workers.cores_of_process() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert workers.cores_of_process() == 4
