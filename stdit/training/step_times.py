"""Measure a few steps of a run, and tell the time of all: ``--dry_run steps``."""

import contextlib
import getpass
import io
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

from stdit.data.batch import Timings
from stdit.data.plan import BatchPlan
from stdit.training.batches import workers_of
from stdit.training.config import TrackerConfig, TrainConfig
from stdit.training.session import Session, start
from stdit.training.stop_signals import StopSignals

MEASURED_STEPS = 3
"""Steps to measure of each bucket, after one that is not counted."""
MAX_SECONDS = 120.0
"""Stop measuring after this long, once enough steps are measured; buckets that have none are estimated."""


@dataclass
class BucketTimes:
    """Measured steps of one bucket."""

    training: list[float] = field(default_factory=list)
    """Seconds of each step."""
    data: list[Timings] = field(default_factory=list)
    """Seconds before each step."""
    seen: int = 0

    def add(self, seconds: float, timings: Timings) -> None:
        """Count a step; the first warms up."""
        self.seen += 1
        if self.seen > 1:
            self.training.append(seconds)
            self.data.append(timings)

    def waiting(self, workers: int) -> float:
        """Return the mean seconds before a step: no less than the loader processes need beside it."""
        reading = fmean(one.reading for one in self.data) / max(1, workers)
        return max(fmean(one.waiting for one in self.data), reading - fmean(self.training))


def measured_times(config: TrainConfig, signals: StopSignals) -> list[str]:
    """Do the first steps of a run in a temporary folder; return the lines of their times. Every rank must call this.

    Nothing of the run itself is touched: it starts anew, without its checkpoints, and saves none.

    Raises:
        UserError: as the run would.
    """
    began = time.perf_counter()
    with _temporary_run(config) as tried:
        with _silent(), start(tried, signals) as session:
            started = time.perf_counter() - began
            plan, processes = session.sampler.components.plan, session.mesh.world_size
            workers = workers_of(session.sampler.components, session.mesh.device, session.mesh.dp)
            times = measure(session, plan)
    return [f"start: {started:.1f} s", *time_lines(config, plan, times, workers, processes)]


def measure(session: Session, plan: BatchPlan) -> list[BucketTimes]:
    """Train the first steps until each bucket is measured; return the times by bucket."""
    times = [BucketTimes() for _ in plan.assignment.buckets]
    used = [k for k, members in enumerate(plan.assignment.members) if len(members)]
    began = time.perf_counter()

    def enough() -> bool:
        counts = [len(times[k].training) for k in used]
        late = time.perf_counter() - began > MAX_SECONDS
        return min(counts) >= MEASURED_STEPS or (late and sum(counts) >= MEASURED_STEPS)

    with contextlib.closing(session.batches(0, 1 << 40)) as batches:  # type: ignore[type-var]
        for batch in batches:
            session.watchdog.phase(f"step {batch.step}, measuring")
            before = time.perf_counter()
            session.trainer.step(batch)
            k = plan.batch(batch.step).bucket_index
            times[k].add(time.perf_counter() - before, batch.timings)
            if session.mesh.on_main(enough):  # by the main rank's clock, so that all stop together
                break
    return times


def time_lines(
    config: TrainConfig, plan: BatchPlan, times: list[BucketTimes], workers: int = 0, processes: int = 1
) -> list[str]:
    """Return the lines of the report: seconds per step of each bucket, on average, and the hours of all steps."""
    cached = config.data.cache != "none"
    lines, seconds = [], [0.0] * len(times)
    buckets = plan.assignment.buckets
    tokens = [bucket.batch_size * (bucket.tokens or 0) for bucket in buckets]
    for k, found in enumerate(times):
        if found.training:
            training, waiting = fmean(found.training), 0.0 if cached else found.waiting(workers)
            seconds[k] = training + waiting
            parts = "" if cached else f": {training:.3g} s training, {waiting:.3g} s waiting for data"
            lines.append(
                f"step of {buckets[k]}: {seconds[k]:.3g} s{parts} (mean of {len(found.training)} steps)"
            )
    per_token = sum(seconds) / sum(count for count, value in zip(tokens, seconds, strict=True) if value)
    for k, members in enumerate(plan.assignment.members):
        if len(members) and not seconds[k]:
            seconds[k] = per_token * tokens[k]
            lines.append(f"step of {buckets[k]}: about {seconds[k]:.3g} s, by its tokens (not measured)")
    shares = [plan.assignment.steps_per_epoch(k) / plan.steps_per_epoch for k in range(len(times))]
    mean = sum(share * value for share, value in zip(shares, seconds, strict=True))
    on = f" on {processes} processes" if processes > 1 else ""
    lines.append(
        f"time{on}: {mean:.3g} s a step, so {config.trainer.steps:,} steps take about "
        f"{_hours(mean * config.trainer.steps)}, without start, validation and checkpoints"
    )
    if cached:
        lines.append(
            f"encoding for data.cache = {config.data.cache}, once: about {_hours(_encoding(config, plan, times))}"
        )
    return lines


def _encoding(config: TrainConfig, plan: BatchPlan, times: list[BucketTimes]) -> float:
    """Return the seconds that all views of all clips take to read and encode, from those of the measured batches."""
    views = config.data.augmented_views * (1 + config.data.flip)
    per_frame_pixel, total = [], 0.0
    for bucket, found in zip(plan.assignment.buckets, times, strict=True):
        volume = bucket.volume * bucket.batch_size
        per_frame_pixel += [(one.reading + one.encoding) / volume for one in found.data]
    for bucket, members in zip(plan.assignment.buckets, plan.assignment.members, strict=True):
        total += bucket.volume * len(members)
    return fmean(per_frame_pixel) * total * views


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 36000 else f"{seconds / 3600:.2f} hours"


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Print and log nothing in a block: the report has shown the notes, and other settings would be warned about."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


@contextlib.contextmanager
def _temporary_run(config: TrainConfig) -> Iterator[TrainConfig]:
    """Provide the settings of a run that is timed, in a folder that is deleted at the end of the block."""
    port = os.environ.get("MASTER_PORT")
    if port is None:
        folder = Path(tempfile.mkdtemp(prefix="stdit-steps-"))
    else:  # all ranks need the same settings, so the same name, before they are connected
        folder = Path(tempfile.gettempdir(), f"stdit-steps-{getpass.getuser()}-{port}")
    try:
        yield replace(
            config,
            output_dir=str(folder),
            name="steps",
            resume="auto",
            dry_run=False,
            # Read and encode each batch: what the cache would save is told from the same steps.
            data=replace(config.data, cache="none", augmented_views=1),
            validation=replace(config.validation, prompts=[], loss_every=None, patience=None),
            tracker=TrackerConfig(),
        )
    finally:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            shutil.rmtree(folder, ignore_errors=True)
