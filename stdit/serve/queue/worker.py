"""A worker of the server: claims jobs, and makes their videos with the pipeline of the command line.

    python -m stdit.serve.queue.worker FOLDER NAME [flags of sample.py]

`stdit.serve.queue.supervisor` starts it, by torchrun if several ranks share a video. It ends when the server does:
its standard input is closed then.
"""

import gc
import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stdit.cli import run
from stdit.errors import UserError
from stdit.pipelines.config import SampleConfig
from stdit.pipelines.finished import difference
from stdit.pipelines.sources import find_checkpoint_source
from stdit.pipelines.video_metadata import provenance, video_metadata
from stdit.serve.errors import RequestError
from stdit.serve.queue.catalog import Catalog, state_of_files
from stdit.serve.queue.job import Job
from stdit.serve.queue.jobs import JobStore
from stdit.serve.queue.paths import ServerPaths
from stdit.serve.queue.submissions import Submission, read_submission
from stdit.settings import parse

if TYPE_CHECKING:
    from stdit.parallel.processes.mesh import Mesh
    from stdit.pipelines.pipeline import STDiTPipeline
    from stdit.pipelines.runner import SampledVideo, SamplingProgress
    from stdit.serve.queue.previews import Previewer

logger = logging.getLogger(__name__)

IDLE_SECONDS = 0.05
"""Between two looks for a job."""
BEAT_SECONDS = 2.0


class BatchCancelledError(Exception):
    """All jobs of a batch were cancelled."""


@dataclass
class ServedPipeline:
    """A pipeline in memory."""

    stamp: str
    """What changes when its files do."""
    path: Path
    """Of its checkpoint or pipeline."""
    pipe: "STDiTPipeline"
    weights: str
    """Their hash."""
    previewer: "Previewer"


@dataclass
class Worker:
    """Makes the videos of jobs, together with the other ranks of its group."""

    name: str
    config: SampleConfig
    paths: ServerPaths
    mesh: "Mesh"
    store: JobStore
    catalog: Catalog
    _loaded: ServedPipeline | None = None
    _state: str = ""
    _beaten: float = 0.0
    _hashes: dict[str, str] = field(default_factory=dict)

    def work(self) -> None:
        """Make videos until the process ends."""
        self._beat("starting")
        try:
            self._load(self.catalog.default, "starting")
            self._warm_up()
        except UserError as error:  # another model may work
            print(f"{self.catalog.default}: {error}", flush=True)
        except Exception:
            if self.mesh.world_size > 1:  # the other ranks wait
                raise
            logger.exception("%s could not make a video of its own size", self.catalog.default)
            self._free_memory()
        while True:
            jobs = self.mesh.on_main(partial(self.store.claim, self.name, self.config.batch_size))
            if jobs:
                self._state = "busy"  # as the claim has recorded
                self.make(jobs)
            else:
                self._beat("idle")
                time.sleep(IDLE_SECONDS)

    def make(self, jobs: Sequence[Job]) -> None:
        """Make the videos of a batch of jobs; each is completed, fails with a reason, or waits again."""
        batch: list[tuple[Job, Submission]] = []
        for job in jobs:
            try:
                batch.append((job, self.mesh.on_all_ranks(partial(self._read, job))))
            except UserError as error:
                self._fail([job], error)
        if batch:
            self._make(batch)

    def _make(self, batch: Sequence[tuple[Job, Submission]]) -> None:
        """Make a batch; if it fails as a batch may, make its halves, so that one job fails alone."""
        try:
            self._load(batch[0][0].model)
        except UserError as error:
            self._fail([job for job, _ in batch], RequestError(str(error), param="model"))
            return
        if self._sample_or_fail(batch):
            return
        self._free_memory()
        middle = (len(batch) + 1) // 2
        for part in (batch[:middle], batch[middle:]):
            self._make(part)

    def _free_memory(self) -> None:
        """Free what an error held, after it is gone."""
        gc.collect()
        if self.mesh.device.type == "cuda":
            import torch

            torch.cuda.empty_cache()

    def _sample_or_fail(self, batch: Sequence[tuple[Job, Submission]]) -> bool:
        """Make a batch, and fail its job if it is alone; return False if its halves are to be tried."""
        try:
            self._sample(batch)
        except UserError as error:  # of all together, such as too little memory, or of one of them
            if len(batch) == 1:
                [(job, one)] = batch
                self._fail([job], UserError(one.shown(str(error))))
            return len(batch) == 1
        except Exception as error:
            # The other ranks wait, or no more can be computed.
            if self.mesh.world_size > 1 or "CUDA" in str(error):
                raise
            logger.exception("%s could not be made", ", ".join(job.id for job, _ in batch))
            if len(batch) == 1:
                message = f"it could not be made ({type(error).__name__}): the output of the server says why"
                self._fail([batch[0][0]], UserError(message))
            return len(batch) == 1
        return True

    def _read(self, job: Job) -> Submission:
        return read_submission(job.body, self.catalog, partial(self.paths.find_frames, self.store))

    def _fail(self, jobs: Sequence[Job], error: UserError) -> None:
        param = error.param if isinstance(error, RequestError) else None

        def record() -> None:
            for job in jobs:
                self.store.fail(self.name, job.id, str(error), param)

        self.mesh.on_main(record)

    def _load(self, name: str, state: str = "busy") -> None:
        """Load a model unless it is the one in memory, or has changed since.

        Args:
            state: of the worker meanwhile.
        """
        from stdit.pipelines.loading import load_pipeline
        from stdit.pipelines.precision import cast
        from stdit.serve.queue.previews import Previewer

        folder, stamp = self.mesh.on_main(partial(self._find, name))  # a run may get a newer one meanwhile
        if self._loaded is not None and self._loaded.stamp == stamp:
            return
        source = self.mesh.on_all_ranks(lambda: find_checkpoint_source(folder, self.config.ema))
        self._loaded = None  # its memory is free before the next one is loaded
        pipe, weights = self.mesh.on_all_ranks(lambda: load_pipeline(source, self.config.ema))
        cast(pipe.to(self.mesh.device).transformer, self.config.dtype)
        pipe.share(self.mesh)
        pipe.set_progress_bar_config(disable=True)
        if self.config.compile:
            pipe.transformer.compile_blocks()
        from stdit.parallel.processes.memory import free_memory

        free = self.mesh.all_gather_objects(free_memory(self.mesh.device, self.config.parallel.memory_gib))
        pipe.codec.enable_tiling(self.config.codec.tile, min(free))
        self._loaded = ServedPipeline(stamp, source.path, pipe, weights, Previewer(pipe.codec))
        self._beat(state, name, str(self.mesh.device))

    def _find(self, name: str) -> tuple[Path | None, str]:
        """Return where a model is, and a text that changes when its files do."""
        model = self.catalog.model(name)
        return model.folder, f"{name} {model.source.path} {state_of_files(model.source.path)}"

    def _warm_up(self) -> None:
        """Make a step, so that the first video does not wait for what is done once."""
        import torch

        assert self._loaded is not None
        pipe = self._loaded.pipe
        self.mesh.on_all_ranks(
            lambda: pipe(
                "warm up",
                generator=torch.Generator(),
                num_inference_steps=1,
                output_type="pt",
                cache="off",
                pab=[],
                refine_pairs=0,
            )
        )

    def _sample(self, batch: Sequence[tuple[Job, Submission]]) -> None:
        """Make the videos of jobs in one batch, and write each, but for those that are there already."""
        from stdit.pipelines.loras import use_loras
        from stdit.pipelines.runner import SampledVideo, sample_batch

        loaded = self._loaded
        assert loaded is not None
        pipe = loaded.pipe
        pending = self.mesh.on_main(
            lambda: [job.id for job, one in batch if not self._is_written(job, one, loaded)]
        )

        def complete() -> None:
            for job, one in batch:
                if job.id not in pending:
                    self._complete(job, one, 0.0)

        self.mesh.on_main(complete)
        unwritten = [(job, one) for job, one in batch if job.id in pending]
        if not unwritten:
            return
        requests = [one.request for _, one in unwritten]
        self.mesh.on_all_ranks(lambda: use_loras(pipe, requests[0].loras, self.config.lora_other_base))
        began = time.monotonic()
        loaded.previewer.begin()
        on_step = partial(self._on_step, unwritten, loaded)

        def sample() -> list[SampledVideo]:
            try:
                return sample_batch(pipe, requests, on_step=on_step)
            except BatchCancelledError:
                return []

        videos = self.mesh.on_all_ranks(sample)
        if not videos:
            return
        seconds = (time.monotonic() - began) / len(unwritten)

        def write() -> None:
            for (job, one), video in zip(unwritten, videos, strict=True):
                self._write(job, one, video, loaded, seconds)

        self.mesh.on_main(write)

    def _on_step(
        self, batch: Sequence[tuple[Job, Submission]], loaded: ServedPipeline, progress: "SamplingProgress"
    ) -> None:
        """Record a step and, if it is time, previews; end the batch if all its jobs were cancelled."""
        own = self.mesh.on_main(partial(self._record_step, batch, loaded, progress))
        if not own:
            raise BatchCancelledError

    def _record_step(
        self, batch: Sequence[tuple[Job, Submission]], loaded: ServedPipeline, progress: "SamplingProgress"
    ) -> set[str]:
        settings = batch[0][1].settings
        previews: list[bytes] = []
        if loaded.previewer.is_due():
            frames, height, width = (int(settings[name]) for name in ("num_frames", "height", "width"))
            fps = float(settings["fps"])
            try:
                previews = loaded.previewer.make(progress.clean_latents, frames, height, width, fps)
            except (OSError, RuntimeError, ValueError) as error:  # the video does not need it
                logger.warning("no preview: %s", error)
        step = progress.segment * progress.steps + progress.step
        ids = [job.id for job, _ in batch]
        return self.store.progress(self.name, ids, step, progress.segments * progress.steps, previews)

    def _metadata(self, one: Submission, loaded: ServedPipeline) -> dict[str, Any]:
        recorded = loaded.pipe.config
        origin = provenance(self.config, loaded.path, loaded.weights, recorded) | {"request": one.body}
        return video_metadata(one.request, recorded, origin, self._hashes)

    def _is_written(self, job: Job, one: Submission, loaded: ServedPipeline) -> bool:
        file = self.paths.video_file(job.id, one.request)
        return file.is_file() and not difference(file, self._metadata(one, loaded))

    def _write(
        self, job: Job, one: Submission, video: "SampledVideo", loaded: ServedPipeline, seconds: float
    ) -> None:
        """Write a video and complete its job; if that fails, such as on a full disk, the job fails alone."""
        from stdit.pipelines.video_io import write_mp4
        from stdit.pipelines.writer import created_folder, explain_disk_errors

        file = self.paths.video_file(job.id, one.request)
        metadata = self._metadata(one, loaded) | video.calls.facts()
        try:
            with explain_disk_errors(file.parent), created_folder(file.parent):
                write_mp4(file, video.frames, metadata["fps"], metadata)
        except UserError as error:
            self.store.fail(self.name, job.id, str(error))
            return
        self._complete(job, one, seconds)

    def _complete(self, job: Job, one: Submission, seconds: float) -> None:
        """Complete a job whose video is written; a job that was cancelled meanwhile has no video."""
        file = self.paths.video_file(job.id, one.request)
        name = str(file.relative_to(self.paths.videos))
        if not self.store.complete(self.name, job.id, name, file.stat().st_size, seconds):
            found = self.store.get(job.id)
            if found is None or found.state == "cancelled":
                file.unlink(missing_ok=True)

    def _beat(self, state: str, model: str | None = None, device: str | None = None) -> None:
        is_old = time.monotonic() - self._beaten > BEAT_SECONDS
        if self.mesh.is_main and (model or state != self._state or is_old):
            self.store.heartbeat(self.name, state, model, device)
            self._state, self._beaten = state, time.monotonic()


def _end_with_server() -> None:
    """End this process as soon as its standard input is closed, since the server has ended then."""

    def wait() -> None:
        while os.read(sys.stdin.fileno(), 1):
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def main() -> None:
    """Read the arguments and work."""
    _end_with_server()
    folder, name, *flags = sys.argv[1:]
    config = parse(SampleConfig, flags)
    from stdit.parallel.processes.device import join_processes
    from stdit.parallel.processes.mesh import build_mesh

    device = join_processes(config.device, config.parallel.timeout)
    mesh = build_mesh(config.parallel, device)
    paths = ServerPaths.read(Path(folder))
    catalog = Catalog(paths.runs, config.checkpoint, paths.loras, config.ema)
    Worker(name, config, paths, mesh, JobStore(paths.jobs_file), catalog).work()


if __name__ == "__main__":
    run(main)
