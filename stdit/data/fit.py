"""Which bucket a clip can fill, why it fills none, and how a long clip is split into temporal windows.

Letters: N clips, K buckets, R reasons.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import overload

import numpy as np

from stdit.data.buckets import Bucket
from stdit.data.manifest.clips import Clip, Clips
from stdit.data.manifest.reading import MAX_EXAMPLES, ReasonCount, Skipped, summary_lines

# Clips of 424 x 240 may fill a bucket of 426 x 240, and clips of 29.97 fps one of 30.
SIZE_SLACK = 1.02
RATE_SLACK = 1.1

# Buckets of equal length with at least this ratio of areas are one resolution in several aspect ratios.
SAME_RESOLUTION = 0.9


def resampled_frames(num_frames: int | np.ndarray, fps: float | np.ndarray, target_fps: float) -> np.ndarray:
    """Return the number of frames after resampling to another rate, rounded, at least 1."""
    return np.maximum(1, np.floor(np.asarray(num_frames) * target_fps / np.asarray(fps) + 0.5)).astype(
        np.int64
    )


def choose_buckets(
    clips: Clips, part: slice, buckets: Sequence[Bucket], allow_upscale: bool, rng: np.random.Generator
) -> np.ndarray:
    """Return each clip's bucket, for a part of the table, int64 [N]; -1 - r if none takes it because of REASONS[r].

    The draws for keep_probability are the next N x K of `rng`.
    """
    num_frames, fps, height, width = (
        getattr(clips, name)[part] for name in ("num_frames", "fps", "height", "width")
    )
    long_enough, fast_enough, large_enough = (np.ones((len(fps), len(buckets)), bool) for _ in range(3))
    for k, bucket in enumerate(buckets):
        long_enough[:, k] = resampled_frames(num_frames, fps, bucket.fps) >= bucket.num_frames
        if not allow_upscale:
            fast_enough[:, k] = (bucket.num_frames == 1) | (fps * RATE_SLACK >= bucket.fps)
            scale = np.maximum(bucket.height / height, bucket.width / width)
            large_enough[:, k] = scale <= SIZE_SLACK
    fits = long_enough & fast_enough & large_enough
    draws = rng.random(fits.shape)
    kept = fits & (draws < np.array([bucket.keep_probability for bucket in buckets]))
    taken = kept & (clips.weight[part, None] > 0)

    clip_ratio = np.array(list(map(math.log, (width / height).tolist())))
    bucket_ratio = np.array([math.log(bucket.width / bucket.height) for bucket in buckets])
    mismatch = np.abs(clip_ratio[:, None] - bucket_ratio[None])  # [N K]
    preference = _resolution_rank(buckets) + mismatch / (1 + mismatch)
    choice = np.where(taken, preference, np.inf).argmin(axis=1)  # [N]

    reasons = np.stack(  # [R N], in the order of REASONS
        [~passed.any(axis=1) for passed in (long_enough, large_enough, fast_enough, fits, kept, taken)]
    )
    return np.where(reasons[-1], -1 - reasons.argmax(axis=0), choice)


def window_counts(clips: Clips, choice: np.ndarray, buckets: Sequence[Bucket]) -> np.ndarray:
    """Return how many windows each clip gives, int64 [N]: how often it fills its bucket, from 1 to max_windows.

    Args:
        choice: result of `choose_buckets`.
    """
    counts = np.ones(len(clips), np.int64)
    for k, bucket in enumerate(buckets):
        if bucket.max_windows > 1:
            places = np.flatnonzero(choice == k)
            frames = resampled_frames(clips.num_frames[places], clips.fps[places], bucket.fps)
            counts[places] = np.clip(frames // bucket.num_frames, 1, bucket.max_windows)
    return counts


def split_into_windows(clips: Clips, counts: np.ndarray) -> tuple[Clips, np.ndarray]:
    """Replace each clip by `counts` parts of whole frames, as equal as possible.

    Returns: the new table, and the number of each part in its clip, int64 (0 for clips that are not split).
    """
    places = np.repeat(np.arange(len(clips)), counts)
    ends = np.cumsum(counts)
    part = np.arange(len(places)) - (ends - counts)[places]
    parts, table = counts[places], clips.take(places)
    frames = table.num_frames.astype(np.int64)
    first, last = frames * part // parts, frames * (part + 1) // parts
    table = replace(
        table,
        num_frames=last - first,
        start=table.start + first / table.fps,
        end=np.where(part + 1 == parts, table.end, table.start + last / table.fps),
    )
    return table, part


def _resolution_rank(buckets: Sequence[Bucket]) -> np.ndarray:
    """Return the rank of each bucket by volume, largest first; aspect ratios of one resolution share a rank."""
    ranks = np.zeros(len(buckets))
    order = sorted(range(len(buckets)), key=lambda k: (-buckets[k].volume, -buckets[k].num_frames))
    rank, leader = -1, None
    for k in order:
        bucket = buckets[k]
        same = (
            leader is not None
            and (bucket.num_frames, bucket.fps) == (leader.num_frames, leader.fps)
            and bucket.volume >= SAME_RESOLUTION * leader.volume
        )
        if not same:
            rank, leader = rank + 1, bucket
        ranks[k] = rank
    return ranks


def _frames(clip: Clip, buckets: Sequence[Bucket]) -> str:
    shortest = min(buckets, key=lambda bucket: (bucket.seconds, bucket.num_frames))
    frames = int(resampled_frames(clip.num_frames, clip.fps, shortest.fps))
    return f"{frames} frames at {shortest.fps:g} fps, the shortest bucket needs {shortest.num_frames}"


def _pixels(clip: Clip, buckets: Sequence[Bucket]) -> str:
    smallest = min(buckets, key=lambda bucket: bucket.height * bucket.width)
    return (
        f"{clip.width}x{clip.height} pixels (width x height), the smallest bucket needs "
        f"{smallest.width}x{smallest.height}; data.allow_upscale enlarges"
    )


def _rate(clip: Clip, buckets: Sequence[Bucket]) -> str:
    slowest = min(bucket.fps for bucket in buckets)
    return f"{clip.fps:g} fps, the slowest bucket needs {slowest:g}; data.allow_upscale repeats frames"


def _all_three(clip: Clip, buckets: Sequence[Bucket]) -> str:
    return f"{clip.num_frames} frames of {clip.width}x{clip.height} at {clip.fps:g} fps"


REASONS: dict[str, Callable[[Clip, Sequence[Bucket]], str]] = {
    "too short": _frames,
    "too small": _pixels,
    "frame rate too low": _rate,
    "no bucket is short, small and slow enough at once": _all_three,
    "excluded by keep_probability": lambda clip, buckets: "",
    "its weight is 0": lambda clip, buckets: "",
}
"""Reasons for which no bucket takes a clip, in the order in which they are tested, and functions for the detail."""


class Dropped(Sequence[tuple[Clip, str]]):
    """Clips that fit no bucket, each with the reason, whose text is made on access."""

    def __init__(
        self, clips: Clips, buckets: Sequence[Bucket], places: np.ndarray, reasons: np.ndarray
    ) -> None:
        """
        Args:
            places: indices of the dropped clips in `clips`, ascending.
            reasons: for each an index into REASONS.
        """
        self.clips, self.buckets, self.places, self.reasons = clips, buckets, places, reasons

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> tuple[Clip, str]: ...
    @overload
    def __getitem__(self, index: slice) -> "Dropped": ...
    def __getitem__(self, index: int | slice) -> "tuple[Clip, str] | Dropped":
        if isinstance(index, slice):
            return Dropped(self.clips, self.buckets, self.places[index], self.reasons[index])
        clip = self.clips[int(self.places[index])]
        kind = list(REASONS)[self.reasons[index]]
        detail = REASONS[kind](clip, self.buckets)
        return clip, f"{kind}: {detail}" if detail else kind

    def summary(self) -> list[str]:
        """Return one line per reason, with a count and examples."""
        codes, firsts = np.unique(self.reasons, return_index=True)
        kinds = {}
        for code in codes[firsts.argsort()].tolist():
            places = np.flatnonzero(self.reasons == code)
            cases = [self[place] for place in places[:MAX_EXAMPLES].tolist()]
            kind = list(REASONS)[code]
            kinds[kind] = ReasonCount(
                len(places), [Skipped(str(clip.media), reason) for clip, reason in cases]
            )
        return summary_lines(kinds)
