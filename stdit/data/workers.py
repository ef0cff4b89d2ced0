"""`data.workers: auto`: how many loader processes, from the cores that are free and the time that decoding takes."""

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from statistics import fmean

from stdit.data.clip_tensors import middle_window
from stdit.data.config import DataConfig
from stdit.data.decoding.decode import DecodeError
from stdit.data.manifest.clips import Clip
from stdit.data.plan import BatchPlan

STEP_SECONDS = 0.1
"""A step is taken to last at least this long, so that batches must be ready this often."""
SAMPLE_CLIPS, SAMPLE_SECONDS = 4, 2.0
"""Clips to decode for the measurement, and when to stop early."""


def count_workers(
    data: DataConfig,
    plan: BatchPlan,
    spare_cores: int,
    dp: int = 1,
    known: Callable[[Clip], bool] = lambda clip: False,
) -> int:
    """Return `data.workers`, or for auto as many as decode the batches in time, but no more than spare cores.

    The batches are the same for any number, so ranks need not agree on it.

    Args:
        spare_cores: of this process, beside those that training uses.
        dp: ranks among which each batch is divided.
        known: whether a clip need not be decoded since the cache has it.
    """
    if data.workers != "auto":
        return data.workers
    if spare_cores < 1:
        return 0
    seconds = list(itertools.islice(_decoding_seconds(plan, known), SAMPLE_CLIPS))
    return min(spare_cores, math.ceil(fmean(seconds or [0.0]) / dp / STEP_SECONDS))


def usable_cores() -> int:
    """Return how many cores the processes of this run may use on this machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_of_process() -> int:
    """Return the share of this process in `usable_cores`."""
    return usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _decoding_seconds(plan: BatchPlan, known: Callable[[Clip], bool]) -> Iterator[float]:
    """Yield estimates of the seconds that decoding a batch takes, each from one clip of the first batches."""
    spent = 0.0
    for step in range(8 * SAMPLE_CLIPS):
        planned = plan.batch(step)
        clip = plan.assignment.clips[planned.indices[0]]
        if known(clip):
            yield 0.0
            continue
        began = time.perf_counter()
        try:
            middle_window(clip, planned.bucket)
        except DecodeError:  # counted and listed when a step needs it
            continue
        finally:
            took = time.perf_counter() - began
            spent += took
        yield took * len(planned.indices)
        if spent > SAMPLE_SECONDS:
            return
