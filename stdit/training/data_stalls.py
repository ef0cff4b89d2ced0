"""Does training wait for its data, and why: a warning that names the cause and the way out."""

import logging
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from stdit.data.config import DataConfig

logger = logging.getLogger(__name__)

HIGH_SHARE = 0.2
"""Of the time of training that waiting may take before a warning."""
WINDOW_SECONDS, WINDOW_STEPS = 60.0, 10
"""A judgement is over at least so much."""
QUIET_SECONDS = 900.0
"""Between two warnings."""


@dataclass
class Spent:
    """Seconds of some steps."""

    waiting: float = 0.0
    """The main process waited for batches, encoding included."""
    training: float = 0.0
    """It trained."""
    encoding: float = 0.0
    """It encoded clips and captions."""
    reading: float = 0.0
    """Loader processes, or the main process where there are none, read and decoded: all together."""
    computing: float = 0.0
    """They computed; for the rest of `reading` they waited themselves."""
    steps: int = 0

    @property
    def share(self) -> float:
        """Of the time that went into waiting."""
        total = self.waiting + self.training
        return self.waiting / total if total else 0.0


def watched(batches: Iterator[dict[str, Any]], config: DataConfig, speaks: bool) -> Iterator[dict[str, Any]]:
    """The batches, with a warning once in a while if training waits long for them.

    Takes from each what it tells of itself: encoding, in seconds, and spent, (reading, computing).
    """
    spent, begun, warned, asked = Spent(), time.monotonic(), -math.inf, 0.0
    while True:
        start = time.monotonic()
        try:
            batch = next(batches)
        except StopIteration:
            return
        came = time.monotonic()
        reading, computing = batch.pop("spent", (0.0, 0.0))
        encoding = batch.pop("encoding", 0.0)
        if asked:  # the first one starts the loader processes
            spent.waiting += came - start
            spent.encoding += encoding
            spent.reading, spent.computing = spent.reading + reading, spent.computing + computing
            spent.steps += 1
        asked = came
        yield batch
        now = time.monotonic()
        if spent.steps:
            spent.training += now - came
        if now - begun > WINDOW_SECONDS and spent.steps >= WINDOW_STEPS:
            if speaks and spent.share > HIGH_SHARE and now - warned > QUIET_SECONDS:
                logger.warning("%s", advice(spent, config, os.cpu_count() or 1))
                warned = now
            spent, begun = Spent(), now


def advice(spent: Spent, config: DataConfig, cores: int) -> str:
    """Why training waits, and what to do. Seconds are a step's."""
    head = f"training waits for data {spent.share:.0%} of the time"
    reading, encoding, training = (
        seconds / max(1, spent.steps) for seconds in (spent.reading, spent.encoding, spent.training)
    )
    if spent.encoding > spent.waiting / 2:
        cause = f"encoding takes {encoding:.2g} s a step"
        if config.cache == "disk":
            return (
                f"{head}: {cause}, since the cache lacks clips or captions. It passes once each was seen; or encode "
                "them all beforehand: scripts/prepare_data.py encode"
            )
        return f"{head}: {cause}. Encode once: data.cache disk, or scripts/prepare_data.py encode before"
    if spent.computing < spent.reading / 2:
        return (
            f"{head}: of the {reading:.2g} s that reading a batch takes, {1 - spent.computing / spent.reading:.0%} "
            "is waiting for a slow disk or a busy CPU. Copy the data (or data.cache_dir) to a faster disk, or raise "
            f"data.workers from {config.workers}"
        )
    needed = math.ceil(reading / training) if training else cores
    if needed > config.workers:
        work = f"decoding a batch takes {reading:.2g} s, and a step {training:.2g} s"
        if needed <= cores:
            return f"{head}: {work}, so data.workers = {config.workers} is too few: set it to {needed}"
        return (
            f"{head}: {work}, so {needed} workers would be needed, and this machine has {cores} cores. Decode and "
            f"encode once: data.cache disk; or set data.workers to {cores}"
        )
    return (
        f"{head}, though its {config.workers} loader processes are fast enough by themselves: something else keeps "
        "the CPU busy, or batches are large to hand over"
    )
