"""Seconds per step and hours of a run, from a few measured steps."""

from stdit.data.assignment import assign_clips
from stdit.data.batch import Timings
from stdit.data.buckets import Bucket
from stdit.data.config import DataConfig
from stdit.data.decoding.media import Media
from stdit.data.manifest.clips import Clip
from stdit.data.plan import BatchPlan
from stdit.training.config import TrainConfig, TrainerConfig
from stdit.training.step_times import BucketTimes, time_lines

BUCKETS = [Bucket(16, 64, 64, 8, batch_size=2).sized(1000), Bucket(16, 32, 32, 8, batch_size=2).sized(250)]


def plan() -> BatchPlan:
    """Three steps of the large bucket and one of the small one per epoch."""
    sides = [64] * 6 + [32] * 2
    clips = [Clip(Media(f"/data/{i}.mp4"), "a clip", 16, 8.0, side, side) for i, side in enumerate(sides)]
    return BatchPlan(assign_clips(clips, BUCKETS))


def times(*steps: tuple[float, Timings]) -> BucketTimes:
    found = BucketTimes()
    for seconds, timings in steps:
        found.add(seconds, timings)
    return found


def lines(large: BucketTimes, small: BucketTimes, workers: int = 0, **data: str) -> list[str]:
    config = TrainConfig(data=DataConfig(**data), trainer=TrainerConfig(steps=3600))
    return time_lines(config, plan(), [large, small], workers)


SLOW_START = (60.0, Timings(60, 60, 60, 60))


def test_buckets_count_by_their_share_of_the_steps_and_the_first_step_does_not() -> None:
    large = times(SLOW_START, (2.0, Timings(1, 1)), (4.0, Timings(1, 1)))
    small = times(SLOW_START, (0.5, Timings(0.5, 0.5)))
    assert lines(large, small) == [
        "step of 16x64x64 at 8 fps: 4 s: 3 s training, 1 s waiting for data (mean of 2 steps)",
        "step of 16x32x32 at 8 fps: 1 s: 0.5 s training, 0.5 s waiting for data (mean of 1 steps)",
        "time: 3.25 s a step, so 3,600 steps take about 3.25 hours, without start, validation and checkpoints",
    ]


def test_a_bucket_without_a_measured_step_is_estimated_by_its_tokens() -> None:
    found = lines(times(SLOW_START, (4.0, Timings())), times(SLOW_START))
    assert found[1] == "step of 16x32x32 at 8 fps: about 1 s, by its tokens (not measured)"
    assert found[2].startswith("time: 3.25 s a step")


def test_batches_that_were_read_ahead_do_not_hide_slow_reading() -> None:
    """Two loader processes that take 8 s for a batch give one in 4 s."""
    slow = times(SLOW_START, (1.0, Timings(waiting=0.0, reading=8.0)))
    found = lines(slow, times(SLOW_START, (1.0, Timings())), workers=2)
    assert found[0] == "step of 16x64x64 at 8 fps: 4 s: 1 s training, 3 s waiting for data (mean of 1 steps)"


def test_a_cache_reads_and_encodes_once() -> None:
    """The small batch has a quarter of the pixels of the large one, and takes as long for a pixel."""
    large = times(SLOW_START, (2.0, Timings(waiting=900, reading=600, encoding=300)))
    small = times(SLOW_START, (2.0, Timings(waiting=225, reading=150, encoding=75)))
    found = lines(large, small, cache="memory", manifest="clips/manifest.csv")
    assert found[0] == "step of 16x64x64 at 8 fps: 2 s (mean of 1 steps)"
    assert found[-2].startswith("time: 2 s a step, so 3,600 steps take about 2.00 hours")
    assert found[-1] == "encoding for data.cache = memory, once: about 0.81 hours"
