"""Videos as the API shows them."""

import time
from typing import Any, Literal

from pydantic import BaseModel

from stdit.serve.queue.health import worker_objects
from stdit.serve.queue.job import RUNNING, WAITING, Job
from stdit.serve.queue.jobs import JobStore

_FIRST_PART = 0.2
"""Part of the steps in which earlier videos foretell the end better than these steps."""


Status = Literal["queued", "in_progress", "completed", "failed", "cancelled"]


class ErrorObject(BaseModel):
    """Why a video failed."""

    message: str
    code: str
    param: str | None


class VideoObject(BaseModel):
    """A video that was asked for."""

    id: str
    object: Literal["video"] = "video"
    status: Status
    progress: int
    """Percent."""
    step: int
    steps: int
    position: int | None
    """Videos that wait before it."""
    eta_seconds: float | None
    created_at: float
    started_at: float | None
    completed_at: float | None
    expires_at: float | None
    model: str
    prompt: str
    seed: int
    size: str
    """Width x height in pixels."""
    seconds: str
    num_frames: int
    height: int
    width: int
    fps: float
    settings: dict[str, Any]
    """A request that makes the same video."""
    warnings: list[str]
    error: ErrorObject | None
    file: str | None


def video_object(job: Job, store: JobStore, keep_days: float | None = None) -> VideoObject:
    """Return what the API says of a job."""
    facts, position, seconds_left = job.facts, None, None
    rate = None if job.is_over else store.seconds_per_work(job.model)
    if job.state == WAITING:
        position, work_before = store.ahead(job.number)
        workers = max(1, sum(one.is_working for one in worker_objects(store)))
        seconds_left = None if rate is None else rate * (work_before / workers + job.work)
    elif job.state == RUNNING and job.started is not None:
        elapsed = time.time() - job.started
        if rate is not None and job.step <= _FIRST_PART * job.steps:  # the first steps tell little
            seconds_left = max(0.0, rate * job.work * (job.batch_size or 1) - elapsed)
        elif job.step:
            seconds_left = elapsed / job.step * (job.steps - job.step)
    done = 100 if job.state == "completed" else min(99, int(100 * job.step / max(1, job.steps)))
    error = None
    if job.error is not None:
        error = ErrorObject(message=job.error, code="generation_failed", param=job.param)
    return VideoObject(
        id=job.id,
        status=job.state,  # type: ignore[arg-type]  # one of `jobs.STATES`
        progress=done,
        step=job.step,
        steps=job.steps,
        position=position,
        eta_seconds=None if seconds_left is None else round(seconds_left, 2),
        created_at=job.created,
        started_at=job.started,
        completed_at=job.finished,
        expires_at=None if keep_days is None or job.finished is None else job.finished + keep_days * 86400,
        model=job.model,
        prompt=facts["prompt"],
        seed=facts["seed"],
        size=f"{facts['width']}x{facts['height']}",
        seconds=f"{facts['num_frames'] / facts['fps']:.3g}",
        num_frames=facts["num_frames"],
        height=facts["height"],
        width=facts["width"],
        fps=facts["fps"],
        settings=job.body,
        warnings=facts["warnings"],
        error=error,
        file=job.file,
    )
