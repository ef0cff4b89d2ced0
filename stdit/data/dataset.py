"""Batches of video by step number, read by worker processes.

Letters: B batch, T frames, H height, W width.
"""

import itertools
import logging
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from stdit.data.buckets import Assignment, Bucket, assign
from stdit.data.config import BucketConfig, DataConfig
from stdit.data.decode import DecodeError, decode_clip
from stdit.data.manifest import Clip, Skipped, read_manifest, summarise
from stdit.data.media import Media
from stdit.data.plan import BatchPlan, PlannedBatch, slack_seconds
from stdit.errors import UserError
from stdit.parallel.mesh import Mesh

__all__ = ["BucketConfig", "DataConfig", "VideoBatches", "build_plan"]

Batch = dict[str, Any]

logger = logging.getLogger(__name__)


def build_assignment(config: DataConfig, seed: int = 0) -> Assignment:
    """Reads the manifest and sorts its clips into the buckets. Raises UserError."""
    config.validate()
    clips, skipped = read_manifest(Path(config.manifest), Path(config.root) if config.root else None)
    buckets = [Bucket.from_config(bucket) for bucket in config.buckets]
    return assign(clips, buckets, seed, config.allow_upscale, skipped)


def build_plan(config: DataConfig, seed: int = 0) -> BatchPlan:
    """From the settings to the plan of all batches; `plan.report()` is what to show. Raises UserError."""
    return BatchPlan(without_dead_buckets(build_assignment(config, seed), config.max_skipped_share), seed)


def without_dead_buckets(assignment: Assignment, max_skipped_share: float) -> Assignment:
    """An assignment without the clips of those buckets in which none can be read.

    A clip that fails gives way to another of its bucket; a bucket cannot give way while training goes on without
    changing which batch every later step has. So a clip of each is read before there is a plan.

    Raises UserError when no bucket is left, or more than max_skipped_share of all clips go with theirs.
    """
    members, skipped = list(assignment.members), list(assignment.skipped)
    tally = SkipTally(assignment.kept, max_skipped_share)
    for k, bucket in enumerate(assignment.buckets):
        failed = _failures_of_all((assignment.clips[index] for index in members[k].tolist()), bucket)
        if failed:
            tally.add(failed)
            skipped += [
                Skipped(path, f"no clip of bucket {bucket} can be read: {why}") for path, why in failed
            ]
            members[k] = members[k][:0]
    if not any(map(len, members)):
        raise tally.error("and none is left: repair or replace the files")
    return replace(assignment, members=members, skipped=skipped)


def _failures_of_all(clips: Iterable[Clip], bucket: Bucket) -> list[Skipped]:
    """Why each clip of a bucket cannot be read; nothing as soon as one can."""
    failed = []
    for clip in clips:
        try:
            middle_window(clip, bucket)
        except DecodeError as error:
            failed.append(Skipped(error.path, error.reason))
        else:
            return []
    return failed


def middle_window(clip: Clip, bucket: Bucket) -> torch.Tensor:
    """The middle of a clip that is longer than its bucket's window, uint8 [T 3 H W]. Raises DecodeError."""
    start = clip.start + slack_seconds(clip, bucket) / 2
    return decode_clip(clip.media, bucket.num_frames, bucket.fps, bucket.height, bucket.width, start=start)


class SkipTally:
    """Counts clips that fail in training, and stops the run when they are more than a share of all."""

    def __init__(self, kept: int, max_share: float) -> None:
        self.kept, self.max_share = kept, max_share
        self.failed: dict[str, str] = {}

    @property
    def limit(self) -> int:
        """The number of clips that may fail."""
        return int(self.max_share * self.kept)

    def add(self, skipped: Iterable[Skipped]) -> None:
        """Raises UserError when too many different clips have failed so far."""
        for path, reason in skipped:
            if path not in self.failed:
                logger.warning("left out: %s cannot be read: %s", path, reason)
            self.failed[path] = reason
        if len(self.failed) > self.limit:
            raise self.error(
                f"more than data.max_skipped_share = {self.max_share:g}: repair or remove the files, or "
                "raise the share"
            )

    def error(self, rule: str) -> UserError:
        failed = [Skipped(path, f"cannot be read: {reason}") for path, reason in self.failed.items()]
        message = f"{len(failed)} of {self.kept} clips failed to decode, {rule}"
        return UserError("\n".join([message, *summarise(failed)]))


class _Failures(NamedTuple):
    """What went wrong with a part of a batch."""

    skipped: list[Skipped]
    replaced: int
    lacking: str | None
    """The bucket of which too few clips are left."""


class _StepDataset(Dataset):
    """Item `step` is this rank's part of its batch; frames stay uint8, a quarter of the bytes to hand over."""

    def __init__(self, plan: BatchPlan, crop: Literal["center", "random"], limit: int, mesh: Mesh) -> None:
        self.plan, self.crop, self.limit, self.mesh = plan, crop, limit, mesh

    def __getitem__(self, step: int) -> Batch:
        planned = self.plan.batch(step)
        failed: dict[Media, Skipped] = {}
        rows = self.mesh.rows(len(planned.items))
        read = [self._read(planned, index, failed) for index in rows]
        whole = [sample for sample in read if sample is not None]
        if len(whole) < len(read):
            return {"failures": _Failures(list(failed.values()), 0, str(planned.bucket))}
        used, frames = zip(*whole, strict=True)
        replaced = sum(planned.indices[row] != clip for row, clip in zip(rows, used, strict=True))
        failures = _Failures(list(failed.values()), replaced, None) if failed else None
        return describe(self.plan, planned, used) | {"frames": torch.stack(frames), "failures": failures}

    def _read(
        self, planned: PlannedBatch, index: int, failed: dict[Media, Skipped]
    ) -> tuple[int, torch.Tensor] | None:
        """The clip that item `index` is made of and its frames uint8 [T 3 H W]; adds failures to `failed`.

        None when too many fail, or all that could stand in.
        """
        bucket = planned.bucket
        generator = torch.Generator().manual_seed(self.plan.crop_seed(planned.step, index))
        stand_ins = self.plan.replacements(planned.step, index)
        for clip_index in itertools.chain([planned.indices[index]], stand_ins):
            if len(failed) > self.limit:
                return None
            clip, start = self.plan.item(planned.step, planned.bucket_index, index, clip_index)
            if clip.media in failed:
                continue
            try:
                frames = decode_clip(
                    clip.media,
                    bucket.num_frames,
                    bucket.fps,
                    bucket.height,
                    bucket.width,
                    start=start,
                    crop=self.crop,
                    generator=generator,
                )
            except DecodeError as error:
                failed[clip.media] = Skipped(error.path, error.reason)
            else:
                return clip_index, frames
        return None


class VideoBatches:
    """`for batch in batches(start_step)`: the batches of the steps from start_step on, in order, without end.

    A batch is a dict: video float32 [B 3 T H W] in [-1, 1]; text, a list of B captions; fps, height, width,
    float32 [B] (frames per second, pixels); clip_indices int64 [B], places in `plan.assignment.clips`; step;
    size, samples in the global batch, of which these B are this rank's part; replaced, how many of all its planned
    clips could not be read and gave way to the next of their bucket.

    The same for any number of workers and ranks; every rank reads its own part, and must iterate as the others do.
    Raises UserError while iterating when more than max_skipped_share of all clips have failed, or none of a bucket
    is left: on every rank, wherever they failed.
    """

    def __init__(
        self,
        plan: BatchPlan,
        workers: int = 0,
        crop: Literal["center", "random"] = "center",
        max_skipped_share: float = 1.0,
        pin_memory: bool = False,
        mesh: Mesh = Mesh(),  # noqa: B008 (it is frozen)
    ) -> None:
        self.plan, self.workers, self.pin_memory, self.mesh = plan, workers, pin_memory, mesh
        self.tally = SkipTally(plan.assignment.kept, max_skipped_share)
        self._dataset = _StepDataset(plan, crop, self.tally.limit, mesh)

    def __call__(self, start_step: int = 0, stop_step: int | None = None) -> Iterator[Batch]:
        """Batches of the steps in [start_step, stop_step)."""
        steps = itertools.count(start_step) if stop_step is None else range(start_step, stop_step)
        loader = DataLoader(
            self._dataset,
            batch_size=None,
            sampler=steps,
            num_workers=self.workers,
            worker_init_fn=_start_worker,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),  # its own, so that torch's global random state is left alone
        )
        for batch in loader:
            failures = self.mesh.heard(batch.pop("failures"))
            if failures:
                self.mesh.everywhere(partial(self._count, failures))
            replaced = sum(part.replaced for part in failures)
            yield batch | {"video": to_video(batch.pop("frames")), "replaced": replaced}

    def _count(self, failures: list[_Failures]) -> None:
        """Raises UserError when too many clips have failed on all ranks together."""
        for part in failures:
            self.tally.add(part.skipped)
        lacking = [part.lacking for part in failures if part.lacking]
        if lacking:
            raise self.tally.error(
                f"and none of bucket {lacking[0]} is left: repair the files and run the same command "
                "again; a new run (--name, --init_from) leaves the bucket out"
            )


def to_video(frames: torch.Tensor) -> torch.Tensor:
    """uint8 [B T 3 H W] to float32 [B 3 T H W] in [-1, 1]."""
    return frames.transpose(1, 2).float().div_(127.5).sub_(1)


def describe(plan: BatchPlan, planned: PlannedBatch, used: Sequence[int]) -> Batch:
    """What a rank's part of a batch, made of the clips `used`, says about itself: all but its frames or latents."""
    bucket = planned.bucket
    size = len(used)
    return {
        "step": planned.step,
        "size": len(planned.items),
        "text": [plan.assignment.clips[index].text for index in used],
        "fps": torch.full((size,), float(bucket.fps)),
        "height": torch.full((size,), float(bucket.height)),
        "width": torch.full((size,), float(bucket.width)),
        "clip_indices": torch.tensor(used, dtype=torch.int64),
    }


def _start_worker(_: int) -> None:
    """Workers share the cores, and leave Ctrl-C and group-wide signals to the main process, which stops
    them."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
