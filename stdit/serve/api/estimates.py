"""What a video will take: seconds, memory and model calls, before it is asked for."""

from threading import Lock

from pydantic import BaseModel

from stdit.serve.queue.jobs import JobStore
from stdit.serve.queue.submissions import Submission

_LOCK = Lock()


class Estimate(BaseModel):
    """What a video takes."""

    seconds: float | None
    """Of its own, without waiting; None: nothing of this model was measured yet."""
    memory_bytes: int
    memory_free_bytes: int
    fits: bool
    model_calls: int
    num_frames: int
    height: int
    width: int
    fps: float
    warnings: list[str]


def estimate(asked: Submission, store: JobStore) -> Estimate:
    """Return what a video takes. Raises UserError if no size of tiles fits in memory."""
    from stdit.parallel.processes.memory import memory_of_process
    from stdit.pipelines.config import SampleConfig
    from stdit.pipelines.loading import load_skeleton, text_encoder_bytes
    from stdit.pipelines.workload import SamplingWorkload

    source, rate = asked.model.source, store.seconds_per_work(asked.model.name)
    pipe = load_skeleton(source)
    workload = SamplingWorkload(
        pipe, [asked.request], SampleConfig(), {"text encoder": text_encoder_bytes(source)}
    )
    memory = workload.memory_of_process = memory_of_process(pipe.mesh.device, None)
    total = workload.total(workload.split(1, 1))
    [videos] = workload.videos
    settings = asked.settings
    return Estimate(
        seconds=None if rate is None else round(rate * asked.work, 3),
        memory_bytes=total,
        memory_free_bytes=memory,
        fits=total <= memory,
        model_calls=workload.schedule(videos).calls()[1].run * videos.segments.count,
        num_frames=asked.total_frames,
        height=settings["height"],
        width=settings["width"],
        fps=settings["fps"],
        warnings=list(asked.warnings),
    )
