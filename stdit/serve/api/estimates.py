"""What a video will take: seconds, memory and model calls, before it is asked for."""

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

from pydantic import BaseModel

from stdit.serve.config import SampleCommand
from stdit.serve.queue.jobs import JobStore
from stdit.serve.queue.submissions import Submission

_SEARCHED = 2**27
"""Pixels of all frames of a segment, above which the search for the best tiles would take seconds."""


class Estimate(BaseModel):
    """What a video takes."""

    seconds: float | None
    """Of its own, without waiting; None: nothing of this model was measured yet."""
    memory_bytes: int
    memory_free_bytes: int
    fits: bool
    model_calls: int
    num_frames: int
    """Of the whole video."""
    overlap: int
    """Frames that two segments share; 0: there is one segment."""
    height: int
    width: int
    fps: float
    warnings: list[str]


def estimate(submission: Submission, store: JobStore, config: SampleCommand) -> Estimate:
    """Return what a video takes alone, in a worker with these settings; no weights are read but the codec's.

    Raises:
        UserError: if no size of tiles fits in memory.
    """
    from stdit.codecs.config import OVERLAP_FRAMES
    from stdit.codecs.tiling import AUTO_SIZES
    from stdit.parallel.processes.device import find_device
    from stdit.parallel.processes.memory import memory_of_process
    from stdit.parallel.processes.mesh import Mesh
    from stdit.pipelines.loading import text_encoder_bytes
    from stdit.pipelines.workload import SamplingWorkload

    source, rate = submission.model.source, store.seconds_per_work(submission.model.name)
    pipe = submission.model.skeleton(config.dtype)
    pipe.share(Mesh(device=find_device(config.device)))
    settings, warnings = submission.settings, list(submission.warnings)
    if config.codec.tile == "auto" and _pixels(settings) > _SEARCHED:
        tile = (2 * OVERLAP_FRAMES, AUTO_SIZES[-1], AUTO_SIZES[-1])
        config = replace(config, codec=replace(config.codec, tile=tile))
        warnings.append(
            "the video is so large that its memory is estimated for the smallest tiles alone: decoding may use "
            "more, up to what is free."
        )
    workload = SamplingWorkload(
        pipe, [submission.request], config, {"text encoder": text_encoder_bytes(source)}
    )
    memory = workload.memory_of_process = memory_of_process(pipe.mesh.device, config.parallel.memory_gib)
    total = workload.total(workload.split(config.ranks, config.ranks // config.parallel.cfg))
    [videos] = workload.videos
    return Estimate(
        seconds=None if rate is None else round(rate * submission.work, 3),
        memory_bytes=total,
        memory_free_bytes=memory,
        fits=total <= memory,
        model_calls=workload.schedule(videos).calls()[1].run * videos.segments.count,
        num_frames=submission.total_frames,
        overlap=(submission.segments.overlap or 0) if submission.segments.count > 1 else 0,
        height=settings["height"],
        width=settings["width"],
        fps=settings["fps"],
        warnings=warnings,
    )


def _pixels(settings: Mapping[str, Any]) -> int:
    return prod(int(settings[name]) for name in ("num_frames", "height", "width"))
