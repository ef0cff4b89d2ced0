"""Raw batches of video by step number, read by worker processes.

Letters: B samples, T frames, H height, W width.
"""

import itertools
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from stdit.data.batch import BatchInfo, Content, Pinnable, RawBatch, ReadFailures, Timings
from stdit.data.clip_tensors import read_view
from stdit.data.decoding.decode import DecodeError
from stdit.data.decoding.media import Media
from stdit.data.manifest.reading import Skipped
from stdit.data.plan import BatchPlan, PlannedBatch
from stdit.data.skips import SkipTally
from stdit.data.views import AugmentedView, may_mirror
from stdit.parallel.processes.mesh import Mesh
from stdit.parallel.processes.step_exchange import StepExchange

READ_FAILURES = "read failures"
"""Name of the loader's flag in the exchange of a step."""

Sample = TypeVar("Sample")
Content_co = TypeVar("Content_co", bound=Pinnable, covariant=True)


class Reader(Protocol[Sample, Content_co]):
    """Reads samples, in the main process or in workers."""

    def read(self, planned: PlannedBatch, index: int, clip_index: int) -> Sample:
        """Read a clip as item `index` of a batch. Raises DecodeError."""

    def collate(self, samples: Sequence[Sample], captions: Sequence[str]) -> Content_co:
        """Put the samples of a batch, all of one size, together."""


@dataclass
class VideoReader:
    """Decodes a window (a crop, a mirror image) of each clip, drawn from (seed, step, index)."""

    plan: BatchPlan
    crop: Literal["center", "random"]
    flip: bool

    def read(self, planned: PlannedBatch, index: int, clip_index: int) -> Tensor:
        """Return frames uint8 [T 3 H W]. Raises DecodeError."""
        clip, start = self.plan.item(planned, index, clip_index)
        view = AugmentedView(start)
        if self.crop == "random" or self.flip:
            generator = torch.Generator().manual_seed(self.plan.crop_seed(planned.step, index))
            down, across, turn = torch.rand(3, generator=generator).tolist()
            if self.crop == "center":
                down = across = 0.5
            view = AugmentedView(start, down, across, self.flip and turn < 0.5 and may_mirror(clip.text))
        return read_view(clip, planned.bucket, view).contiguous()

    def collate(self, samples: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
        """Return frames uint8 [B T 3 H W]."""
        return torch.stack(list(samples))


class _StepDataset(Dataset, Generic[Sample, Content]):
    """Item `step` is this rank's part of that step's batch."""

    def __init__(self, plan: BatchPlan, reader: Reader[Sample, Content], limit: int, mesh: Mesh) -> None:
        self.plan, self.reader, self.limit, self.mesh = plan, reader, limit, mesh

    def __getitem__(self, step: int) -> RawBatch[Content]:
        began, computed = time.perf_counter(), time.thread_time()
        planned = self.plan.batch(step)
        failed: dict[Media, Skipped] = {}
        rows = self.mesh.sample_range(len(planned.indices))
        read = [self._read(planned, index, failed) for index in rows]
        found = [one for one in read if one is not None]
        used = [clip_index for clip_index, _ in found]
        info = batch_info(self.plan, planned, used)
        if len(found) < len(read):
            failures = ReadFailures(list(failed.values()), 0, str(planned.bucket))
            return RawBatch(info, None, failures)
        replaced = sum(planned.indices[row] != clip for row, clip in zip(rows, used, strict=True))
        content = self.reader.collate([sample for _, sample in found], info.captions)
        return RawBatch(
            info,
            content,
            ReadFailures(list(failed.values()), replaced, None) if failed else None,
            timings=Timings(reading=time.perf_counter() - began, computing=time.thread_time() - computed),
        )

    def _read(
        self, planned: PlannedBatch, index: int, failed: dict[Media, Skipped]
    ) -> tuple[int, Sample] | None:
        """Read item `index`: return the clip's index, or that of its stand-in, and its sample.

        Adds failures to `failed`. Returns None if there are too many of them, or if no clip of the bucket is left.
        """
        stand_ins = self.plan.replacements(planned.step, index)
        for clip_index in itertools.chain([planned.indices[index]], stand_ins):
            if len(failed) > self.limit:
                return None
            if failed and self._media(clip_index) in failed:
                continue
            try:
                return clip_index, self.reader.read(planned, index, clip_index)
            except DecodeError as error:
                failed[self._media(clip_index)] = Skipped(error.path, error.reason)
        return None

    def _media(self, clip_index: int) -> Media:
        return self.plan.assignment.clips[clip_index].media


class Loader(Generic[Content]):
    """``for raw in loader(start_step)``: this rank's part of each batch, read but not encoded.

    The batches are the same for any number of workers and ranks. Every rank must iterate as the others do: they
    exchange which clips could not be read, so that `RawBatch.replaced` is that of the global batch.

    Raises:
        UserError: while iterating, on every rank, if too many clips have failed on all of them together, or if no
            readable clip is left to fill a batch.
    """

    def __init__(
        self,
        plan: BatchPlan,
        reader: Reader[Sample, Content],
        tally: SkipTally,
        workers: int = 0,
        pin_memory: bool = False,
        mesh: Mesh = Mesh(),  # noqa: B008 (it is frozen)
        exchange: StepExchange | None = None,
    ) -> None:
        """Make a loader.

        Args:
            workers: processes that read; 0 reads in this one.
            exchange: of the training steps between the batches; None: the loader exchanges by itself.
        """
        self.workers, self.pin_memory, self.mesh, self.tally = workers, pin_memory, mesh, tally
        self.exchange, self._has_failures = exchange or StepExchange(mesh), False
        self.exchange.register(READ_FAILURES, lambda: [self._has_failures])
        self._dataset = _StepDataset(plan, reader, tally.limit, mesh)

    def __call__(self, start_step: int = 0, stop_step: int | None = None) -> Iterator[RawBatch[Content]]:
        """Iterate over the steps in [start_step, stop_step), without end if stop_step is None."""
        steps = itertools.count(start_step) if stop_step is None else range(start_step, stop_step)
        loader = DataLoader(
            self._dataset,
            batch_size=None,
            sampler=steps,
            num_workers=self.workers,
            worker_init_fn=start_worker,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),  # its own, so that torch's global random state is left alone
        )
        if self.mesh.world_size == 1:
            yield from map(self._agreed, loader)
            return
        # The flag that says that some rank has failures in its part of a batch must be known before any rank starts
        # the step, since a rank whose part cannot be filled would leave the others waiting inside the model. So one
        # batch is read ahead: its flag travels in the exchange of the step before.
        raws = iter(loader)
        raw = next(raws, None)
        self.exchange.discard(READ_FAILURES)
        self._flag(raw)
        while raw is not None:
            (failed,) = self.exchange.take(READ_FAILURES)
            raw, ahead = self._agreed(raw) if failed else raw, next(raws, None)
            self._flag(ahead)
            yield raw
            raw = ahead

    def _flag(self, upcoming: RawBatch[Content] | None) -> None:
        self._has_failures = upcoming is not None and upcoming.failures is not None

    def _agreed(self, raw: RawBatch[Content]) -> RawBatch[Content]:
        """Exchange failures with the other ranks, and count them; every rank must call this.

        Raises UserError on every rank if there are too many.
        """
        failures = self.mesh.gather_failures(raw.failures)
        if failures:
            self.mesh.on_all_ranks(partial(self._count, failures, raw.info.step))
        return replace(raw, replaced=sum(part.replaced for part in failures))

    def _count(self, failures: list[ReadFailures], step: int) -> None:
        """Raise UserError if too many clips have failed on all ranks together."""
        for part in failures:
            self.tally.add(part.skipped, step)
        exhausted = [part.exhausted_bucket for part in failures if part.exhausted_bucket]
        if exhausted:
            raise self.tally.error(
                f"and none of bucket {exhausted[0]} is left: repair the files and run the same command "
                "again; a new run (--name, --init_from) excludes the bucket"
            )


def video_loader(
    plan: BatchPlan,
    workers: int = 0,
    crop: Literal["center", "random"] = "center",
    max_skipped_share: float = 1.0,
    pin_memory: bool = False,
    mesh: Mesh = Mesh(),  # noqa: B008
    flip: bool = False,
    tally: SkipTally | None = None,
    exchange: StepExchange | None = None,
) -> Loader[Tensor]:
    """Return a loader of frames uint8 [B T 3 H W], decoded for each step; `to_video` makes floats of them."""
    tally = tally or SkipTally(plan.assignment.files, max_skipped_share)
    return Loader(plan, VideoReader(plan, crop, flip), tally, workers, pin_memory, mesh, exchange)


def batch_info(plan: BatchPlan, planned: PlannedBatch, used: Sequence[int]) -> BatchInfo:
    """Return what is known of a rank's part of a batch that consists of the clips `used`."""
    bucket, count = planned.bucket, len(used)
    return BatchInfo(
        step=planned.step,
        batch_size=len(planned.indices),
        captions=[plan.assignment.clips.texts[index] for index in used],
        clip_indices=torch.tensor(used, dtype=torch.int64),
        fps=torch.full((count,), float(bucket.fps)),
        height=torch.full((count,), float(bucket.height)),
        width=torch.full((count,), float(bucket.width)),
    )


def start_worker(_: int) -> None:
    """Set up a worker: one thread, and Ctrl-C and signals are left to the main process, which stops the workers."""
    torch.set_num_threads(1)
    signal.set_wakeup_fd(-1)  # the main process is notified of its own signals through it
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
