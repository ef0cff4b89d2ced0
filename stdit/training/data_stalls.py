"""Time how long training waits for its data, and warn when that is long, with the cause and the way out."""

import logging
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from stdit.cli import as_started
from stdit.data.batch import EncodedBatch, Timings
from stdit.data.config import DataConfig

logger = logging.getLogger(__name__)

HIGH_SHARE = 0.2
"""Warn when waiting takes more than this share of the time."""
WINDOW_SECONDS, WINDOW_STEPS = 60.0, 10
"""Judge over at least this long, and this many steps."""
QUIET_SECONDS = 900.0
"""Between two warnings."""


@dataclass
class StallWindow:
    """Seconds that the steps of a window took, all together."""

    training: float = 0.0
    """The main process used the batches."""
    data: Timings = field(default_factory=Timings)
    """Where the time before the batches went."""
    steps: int = 0

    def add(self, timings: Timings) -> None:
        """Count a batch."""
        for name, seconds in vars(timings).items():
            setattr(self.data, name, getattr(self.data, name) + seconds)
        self.steps += 1

    @property
    def share(self) -> float:
        """Share of the time in which training waited for data."""
        total = self.data.waiting + self.training
        return self.data.waiting / total if total else 0.0


def timed_batches(batches: Iterator[EncodedBatch], config: DataConfig, warns: bool) -> Iterator[EncodedBatch]:
    """Yield the batches with `Timings.waiting`, and log a warning now and then if training waits long for them."""
    window, began, warned, first = StallWindow(), time.perf_counter(), -math.inf, True
    while True:
        asked = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        came = time.perf_counter()
        batch.timings.waiting = came - asked
        if not first:  # the first batch waits for the reader processes to start
            window.add(batch.timings)
        yield batch
        now = time.perf_counter()
        if not first:
            window.training += now - came
        first = False
        if now - began > WINDOW_SECONDS and window.steps >= WINDOW_STEPS:
            if warns and window.share > HIGH_SHARE and now - warned > QUIET_SECONDS:
                logger.warning("%s", advice(window, config, os.cpu_count() or 1))
                warned = now
            window, began = StallWindow(), now


def advice(window: StallWindow, config: DataConfig, cores: int) -> str:
    """Return why training waits, and what to do about it. Seconds in the message are per step."""
    workers = config.workers
    assert workers != "auto", "resolved by stdit.data.workers.count_workers"
    head, data = f"training waits for data {window.share:.0%} of the time", window.data
    reading, encoding, training = (
        seconds / max(1, window.steps) for seconds in (data.reading, data.encoding, window.training)
    )
    if data.encoding > data.waiting / 2:
        cause = f"encoding takes {encoding:.2g} s a step"
        if config.cache == "disk":
            return (
                f"{head}: {cause}, since the cache lacks clips or captions. It ends once each was seen; or encode "
                f"them all beforehand: {as_started('scripts/prepare_data.py')} encode"
            )
        command = as_started("scripts/prepare_data.py")
        return f"{head}: {cause}. Encode once: data.cache disk, or {command} encode before"
    if data.computing < data.reading / 2:
        return (
            f"{head}: of the {reading:.2g} s that reading a batch takes, {1 - data.computing / data.reading:.0%} "
            "is waiting for a slow disk or a busy CPU. Copy the data (or data.cache_dir) to a faster disk, or raise "
            f"data.workers from {workers}"
        )
    needed = math.ceil(reading / training) if training else cores
    if needed > workers:
        work = f"decoding a batch takes {reading:.2g} s, and a step {training:.2g} s"
        if needed <= cores:
            return f"{head}: {work}, so data.workers = {workers} is too few: set it to {needed}"
        return (
            f"{head}: {work}, so {needed} workers would be needed, and this machine has {cores} cores. Decode and "
            f"encode once: data.cache disk; or set data.workers to {cores}"
        )
    return (
        f"{head}, though its {workers} loader processes are fast enough by themselves: something else keeps "
        "the CPU busy, or batches are large to hand over"
    )
