"""From settings and a manifest to the plan of all batches."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from stdit.data.assignment import Assignment, assign_clips
from stdit.data.buckets import Bucket
from stdit.data.clip_tensors import middle_window
from stdit.data.config import DataConfig
from stdit.data.decoding.decode import DecodeError
from stdit.data.manifest.clips import Clip, Clips
from stdit.data.manifest.config import SourceConfig
from stdit.data.manifest.reading import Skipped, clip_warnings, read_sources
from stdit.data.manifest.triggers import clips_with_trigger
from stdit.data.plan import BatchPlan
from stdit.data.skips import SkipTally

PROBE_SIDE = 16
"""Pixels of each side when a clip is decoded only to see whether it can be."""


def build_assignment(config: DataConfig, seed: int = 0, index: Path | None = None) -> Assignment:
    """Read the manifest and sort its clips into the buckets. Raises UserError."""
    config.validate()
    clips, skipped = read_sources(config.all_sources(), config.caption_scores, index)
    clips, own = clips_with_trigger(clips, config.trigger), len(clips)
    if (mixed := config.regularisation).manifest is not None:
        source = SourceConfig(mixed.manifest, mixed.root)
        more, excluded = read_sources([source], config.caption_scores, index and index / "regularisation")
        clips, skipped = Clips.concatenate([clips, clips_with_trigger(more, None)]), skipped + excluded
    buckets = [Bucket.from_config(bucket) for bucket in config.multiplied_buckets()]
    assignment = assign_clips(
        clips, buckets, seed, config.allow_upscale, skipped, config.bucket_choice, config.max_crop
    )
    assignment = replace(assignment, warnings=clip_warnings(clips))
    return assignment if len(clips) == own else assignment.with_regularisation(own, mixed.share)


def build_plan(
    config: DataConfig,
    seed: int = 0,
    index: Path | None = None,
    known: Callable[[Clip], bool] = lambda clip: False,
) -> BatchPlan:
    """Return the plan of all batches; ``plan.report()`` shows it. Raises UserError.

    Args:
        index: folder that keeps the parsed rows of large manifests for the next call.
        known: whether a clip is known to be readable, so that it need not be opened; see `cache.keys.remembered`.
    """
    assignment = build_assignment(config, seed, index)
    return BatchPlan(without_dead_buckets(assignment, config.max_skipped_share, known), seed)


def without_dead_buckets(
    assignment: Assignment,
    max_skipped_share: float,
    known: Callable[[Clip], bool] = lambda clip: False,
) -> Assignment:
    """Return the assignment without the clips of buckets in which no clip can be read.

    A clip that fails in training is replaced by another of its bucket. A whole bucket cannot be replaced without
    changing every later batch, so one clip of each bucket is decoded before there is a plan: at a low resolution,
    since that delays the first step, and only if none of them is known to be readable.

    Raises:
        UserError: if no bucket is left, or more than max_skipped_share of all clips go with their buckets.
    """
    members, skipped = list(assignment.members), list(assignment.skipped)
    tally = SkipTally(assignment.files, max_skipped_share)
    for k, bucket in enumerate(assignment.buckets):
        clips = (assignment.clips[int(index)] for index in members[k])
        failed = _failures_if_all(clips, replace(bucket, height=PROBE_SIDE, width=PROBE_SIDE), known)
        if failed:
            tally.add(failed)
            skipped += [
                Skipped(path, f"no clip of bucket {bucket} can be read: {why}") for path, why in failed
            ]
            members[k] = members[k][:0]
    if not any(map(len, members)):
        raise tally.error("and none is left: repair or replace the files")
    return replace(assignment, members=members, skipped=skipped)


def _failures_if_all(clips: Iterable[Clip], bucket: Bucket, known: Callable[[Clip], bool]) -> list[Skipped]:
    """Return why each clip of a bucket cannot be read; an empty list if one can."""
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
