"""Batches of video by step number, read by worker processes.

Letters: B batch, T frames, H height, W width.
"""

import itertools
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from stdit.data.assignment import Assignment, assign_clips
from stdit.data.buckets import Bucket
from stdit.data.config import BucketConfig, DataConfig
from stdit.data.decoding.decode import DecodeError, decode_clip
from stdit.data.decoding.media import Media
from stdit.data.manifest.clips import Clip
from stdit.data.manifest.reading import Skipped, clip_warnings, read_sources
from stdit.data.plan import BatchPlan, PlannedBatch
from stdit.data.skips import SkipTally
from stdit.data.views import AugmentedView, augmented_view, may_mirror
from stdit.parallel.processes.mesh import Mesh

__all__ = ["BucketConfig", "DataConfig", "VideoBatches", "build_plan"]

Batch = dict[str, Any]

GLANCE = 16
"""Pixels of a side where a clip is read to see that it can be."""


def build_assignment(config: DataConfig, seed: int = 0, index: Path | None = None) -> Assignment:
    """Reads the manifest and sorts its clips into the buckets. Raises UserError."""
    config.validate()
    clips, skipped = read_sources(config.all_sources(), config.caption_scores, index)
    buckets = [Bucket.from_config(bucket) for bucket in config.multiplied_buckets()]
    assignment = assign_clips(clips, buckets, seed, config.allow_upscale, skipped)
    return replace(assignment, warnings=clip_warnings(clips))


def build_plan(
    config: DataConfig,
    seed: int = 0,
    index: Path | None = None,
    known: Callable[[Clip], bool] = lambda clip: False,
) -> BatchPlan:
    """Return the plan of all batches; `plan.report()` describes it. Raises UserError.

    Args:
        index: folder in which the rows of large manifests are kept, so that they are read only once.
        known: whether a clip is known to be readable, so that it need not be opened; see `cache.keys.remembered`.
    """
    assignment = build_assignment(config, seed, index)
    return BatchPlan(without_dead_buckets(assignment, config.max_skipped_share, known), seed)


def without_dead_buckets(
    assignment: Assignment, max_skipped_share: float, known: Callable[[Clip], bool] = lambda clip: False
) -> Assignment:
    """An assignment without the clips of those buckets in which none can be read.

    A clip that fails gives way to another of its bucket; a bucket cannot give way while training goes on without
    changing which batch every later step has. So a clip of each, unless one is `known` to be readable, is read before
    there is a plan; in few pixels, since that delays the first step.

    Raises UserError when no bucket is left, or more than max_skipped_share of all clips go with theirs.
    """
    members, skipped = list(assignment.members), list(assignment.skipped)
    tally = SkipTally(assignment.files, max_skipped_share)
    for k, bucket in enumerate(assignment.buckets):
        clips = (assignment.clips[int(index)] for index in members[k])
        failed = _failures_of_all(clips, replace(bucket, height=GLANCE, width=GLANCE), known)
        if failed:
            tally.add(failed)
            skipped += [
                Skipped(path, f"no clip of bucket {bucket} can be read: {why}") for path, why in failed
            ]
            members[k] = members[k][:0]
    if not any(map(len, members)):
        raise tally.error("and none is left: repair or replace the files")
    return replace(assignment, members=members, skipped=skipped)


def _failures_of_all(clips: Iterable[Clip], bucket: Bucket, known: Callable[[Clip], bool]) -> list[Skipped]:
    """Why each clip of a bucket cannot be read; nothing as soon as one can."""
    failed = []
    for clip in clips:
        if known(clip):
            return []
        try:
            middle_window(clip, bucket)
        except DecodeError as error:
            failed.append(Skipped(error.path, error.reason))
        else:
            return []
    return failed


def middle_window(clip: Clip, bucket: Bucket) -> Tensor:
    """The middle of a clip that is longer than its bucket's window, uint8 [T 3 H W]. Raises DecodeError."""
    return read_view(clip, bucket, augmented_view(DataConfig(), 0, clip, bucket))


def read_view(clip: Clip, bucket: Bucket, view: AugmentedView) -> Tensor:
    """The frames of a view, uint8 [T 3 H W]. Raises DecodeError."""
    frames = decode_clip(
        clip.media,
        bucket.num_frames,
        bucket.fps,
        bucket.height,
        bucket.width,
        start=view.start,
        crop=(view.down, view.across),
    )
    return frames.flip(-1) if view.mirrored else frames


@dataclass
class Sample:
    """What a reader makes of one clip: its frames, or its latents where they were stored."""

    clip_index: int
    frames: Tensor | None = None
    """uint8 [T 3 H W]"""
    latents: Tensor | None = None
    """float32 [C T' H' W']"""
    key: bytes = b""
    """Of the latents, in the cache."""
    new: list[Any] = field(default_factory=list)
    """What the cache is to learn from it: see `stdit.data.cache.reader`."""


class Reader(Protocol):
    """Makes samples of clips, in whatever process it is needed."""

    def read(self, planned: PlannedBatch, index: int, clip_index: int) -> Sample:
        """A clip as item `index` of a batch. Raises DecodeError."""

    def collate(self, samples: Sequence[Sample], captions: Sequence[str]) -> Batch:
        """Samples of one size to what goes from a worker to the main process."""


@dataclass
class VideoReader:
    """Decodes: every sample has a window (and a crop, a mirror image) of its own, from (seed, step, index)."""

    plan: BatchPlan
    crop: Literal["center", "random"]
    flip: bool

    def read(self, planned: PlannedBatch, index: int, clip_index: int) -> Sample:
        clip, start = self.plan.item(planned, index, clip_index)
        view = AugmentedView(start)
        if self.crop == "random" or self.flip:
            generator = torch.Generator().manual_seed(self.plan.crop_seed(planned.step, index))
            down, across, turn = torch.rand(3, generator=generator).tolist()
            if self.crop == "center":
                down = across = 0.5
            view = AugmentedView(start, down, across, self.flip and turn < 0.5 and may_mirror(clip.text))
        return Sample(clip_index, read_view(clip, planned.bucket, view).contiguous())

    def collate(self, samples: Sequence[Sample], captions: Sequence[str]) -> Batch:
        return {"frames": torch.stack([sample.frames for sample in samples if sample.frames is not None])}


class Failures(NamedTuple):
    """What went wrong with a part of a batch."""

    skipped: list[Skipped]
    replaced: int
    lacking: str | None
    """The bucket of which too few clips are left."""


class _StepDataset(Dataset):
    """Item `step` is this rank's part of its batch."""

    def __init__(self, plan: BatchPlan, reader: Reader, limit: int, mesh: Mesh) -> None:
        self.plan, self.reader, self.limit, self.mesh = plan, reader, limit, mesh

    def __getitem__(self, step: int) -> Batch:
        began, computed = time.perf_counter(), time.thread_time()
        planned = self.plan.batch(step)
        failed: dict[Media, Skipped] = {}
        rows = self.mesh.sample_range(len(planned.indices))
        read = [self._read(planned, index, failed) for index in rows]
        whole = [sample for sample in read if sample is not None]
        if len(whole) < len(read):
            return {"step": step, "failures": Failures(list(failed.values()), 0, str(planned.bucket))}
        used = [sample.clip_index for sample in whole]
        replaced = sum(planned.indices[row] != clip for row, clip in zip(rows, used, strict=True))
        failures = Failures(list(failed.values()), replaced, None) if failed else None
        batch = describe(self.plan, planned, used)
        batch |= self.reader.collate(whole, batch["text"])
        spent = time.perf_counter() - began, time.thread_time() - computed
        return batch | {"failures": failures, "spent": spent}

    def _read(self, planned: PlannedBatch, index: int, failed: dict[Media, Skipped]) -> Sample | None:
        """What item `index` is made of; adds failures to `failed`.

        None when too many fail, or all that could stand in.
        """
        stand_ins = self.plan.replacements(planned.step, index)
        for clip_index in itertools.chain([planned.indices[index]], stand_ins):
            if len(failed) > self.limit:
                return None
            if failed and self._media(clip_index) in failed:
                continue
            try:
                return self.reader.read(planned, index, clip_index)
            except DecodeError as error:
                failed[self._media(clip_index)] = Skipped(error.path, error.reason)
        return None

    def _media(self, clip_index: int) -> Media:
        return self.plan.assignment.clips[clip_index].media


class Loader:
    """`for batch in loader(start_step)`: what a reader makes of the steps from start_step on, without end.

    A batch is what `describe` and the reader's `collate` give, with replaced, how many of all its planned clips could
    not be read and gave way to the next of their bucket; and spent, seconds that reading took, of which computing.

    The same for any number of workers and ranks; every rank reads its own part, and must iterate as the others do.
    Raises UserError while iterating when the tally has too many failures, or no clip of a bucket is left: on every
    rank, wherever they failed.
    """

    def __init__(
        self,
        plan: BatchPlan,
        reader: Reader,
        tally: SkipTally,
        workers: int = 0,
        pin_memory: bool = False,
        mesh: Mesh = Mesh(),  # noqa: B008 (it is frozen)
    ) -> None:
        self.workers, self.pin_memory, self.mesh, self.tally = workers, pin_memory, mesh, tally
        self._dataset = _StepDataset(plan, reader, tally.limit, mesh)

    def __call__(self, start_step: int = 0, stop_step: int | None = None) -> Iterator[Batch]:
        """Batches of the steps in [start_step, stop_step)."""
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
        for batch in loader:
            failures = self.mesh.gather_failures(batch.pop("failures"))
            if failures:
                self.mesh.on_all_ranks(partial(self._count, failures, batch["step"]))
            yield batch | {"replaced": sum(part.replaced for part in failures)}

    def _count(self, failures: list[Failures], step: int) -> None:
        """Raises UserError when too many clips have failed on all ranks together."""
        for part in failures:
            self.tally.add(part.skipped, step)
        lacking = [part.lacking for part in failures if part.lacking]
        if lacking:
            raise self.tally.error(
                f"and none of bucket {lacking[0]} is left: repair the files and run the same command "
                "again; a new run (--name, --init_from) leaves the bucket out"
            )


class VideoBatches(Loader):
    """Batches of video float32 [B 3 T H W] in [-1, 1], decoded as they are needed."""

    def __init__(
        self,
        plan: BatchPlan,
        workers: int = 0,
        crop: Literal["center", "random"] = "center",
        max_skipped_share: float = 1.0,
        pin_memory: bool = False,
        mesh: Mesh = Mesh(),  # noqa: B008
        flip: bool = False,
        tally: SkipTally | None = None,
    ) -> None:
        tally = tally or SkipTally(plan.assignment.files, max_skipped_share)
        super().__init__(plan, VideoReader(plan, crop, flip), tally, workers, pin_memory, mesh)

    def __call__(self, start_step: int = 0, stop_step: int | None = None) -> Iterator[Batch]:
        for batch in super().__call__(start_step, stop_step):
            yield batch | {"video": to_video(batch.pop("frames"))}


def to_video(frames: Tensor) -> Tensor:
    """uint8 [B T 3 H W] to float32 [B 3 T H W] in [-1, 1], where they are."""
    if frames.device.type != "cpu":
        return frames.transpose(1, 2).float().div_(127.5).sub_(1)
    # With NumPy, since torch's threads would wait for those of loaders
    video = frames.numpy().astype(np.float32)
    video /= 127.5
    video -= 1
    return torch.from_numpy(video).transpose(1, 2)


def describe(plan: BatchPlan, planned: PlannedBatch, used: Sequence[int]) -> Batch:
    """What a rank's part of a batch, made of the clips `used`, says about itself: all but its frames or latents.

    text, a list of B captions; fps, height, width, float32 [B] (frames per second, pixels); clip_indices int64 [B],
    places in `plan.assignment.clips`; step; size, samples in the global batch, of which these B are this rank's part.
    """
    bucket = planned.bucket
    size = len(used)
    return {
        "step": planned.step,
        "size": len(planned.indices),
        "text": [plan.assignment.clips.texts[index] for index in used],
        "fps": torch.full((size,), float(bucket.fps)),
        "height": torch.full((size,), float(bucket.height)),
        "width": torch.full((size,), float(bucket.width)),
        "clip_indices": torch.tensor(used, dtype=torch.int64),
    }


def start_worker(_: int) -> None:
    """Workers share the cores, and leave Ctrl-C and group-wide signals to the main process, which stops
    them."""
    torch.set_num_threads(1)
    signal.set_wakeup_fd(-1)  # by which the main process hears of its own signals
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
