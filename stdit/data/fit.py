"""Which bucket a clip can fill, why it fills none, and how a long clip is split into temporal windows.

Letters: N clips, K buckets, R reasons.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, overload

import numpy as np

from stdit.data.buckets import Bucket
from stdit.data.manifest.clips import Clip, Clips
from stdit.data.manifest.reading import MAX_EXAMPLES, ReasonCount, Skipped, summary_lines

# Clips of 424 x 240 may fill a bucket of 426 x 240, and clips of 29.97 fps one of 30.
SIZE_SLACK = 1.02
RATE_SLACK = 1.1

# Buckets of equal length with at least this ratio of areas are one resolution in several aspect ratios.
SAME_RESOLUTION = 0.9

# Buckets that cut at most this much more of a clip than the best one count as having its aspect ratio.
SAME_ASPECT = 0.05


@dataclass(frozen=True)
class BucketRules:
    """How a clip's bucket is chosen: see `DataConfig`."""

    allow_upscale: bool = False
    bucket_choice: Literal["aspect", "size"] = "size"
    max_crop: float = 1.0


def resampled_frames(num_frames: int | np.ndarray, fps: float | np.ndarray, target_fps: float) -> np.ndarray:
    """Return the number of frames after resampling to another rate, rounded, at least 1."""
    return np.maximum(1, np.floor(np.asarray(num_frames) * target_fps / np.asarray(fps) + 0.5)).astype(
        np.int64
    )


def cropped_share(width: np.ndarray | int, height: np.ndarray | int, bucket: Bucket) -> np.ndarray:
    """Return the share of a clip's picture that is cut away for the bucket's aspect ratio, from 0 to 1."""
    ratio = np.asarray(width) / np.asarray(height) * (bucket.height / bucket.width)
    return 1 - np.minimum(ratio, 1 / ratio)


@dataclass(frozen=True)
class Fit:
    """Which of the buckets can take each of some clips; all arrays are [N K]."""

    long_enough: np.ndarray
    large_enough: np.ndarray
    fast_enough: np.ndarray
    mismatch: np.ndarray
    """Distance of the logarithms of the aspect ratios."""
    uncut: np.ndarray
    """Whether at most max_crop of the picture is cut."""
    drawn: np.ndarray
    """Whether keep_probability lets the bucket take the clip."""
    weighted: np.ndarray
    """Whether the weight of the clip is above 0, [N 1]."""
    buckets: Sequence[Bucket]
    bucket_choice: Literal["aspect", "size"]

    @classmethod
    def of(
        cls,
        clips: Clips,
        part: slice,
        buckets: Sequence[Bucket],
        rules: BucketRules,
        rng: np.random.Generator,
    ) -> "Fit":
        """Compare a part of the table with the buckets; draws for keep_probability are the next N x K of `rng`."""
        num_frames, fps, height, width = (
            getattr(clips, name)[part] for name in ("num_frames", "fps", "height", "width")
        )
        shape = (len(fps), len(buckets))
        long_enough, fast_enough, large_enough = (np.ones(shape, bool) for _ in range(3))
        for k, bucket in enumerate(buckets):
            long_enough[:, k] = resampled_frames(num_frames, fps, bucket.fps) >= bucket.num_frames
            if not rules.allow_upscale:
                fast_enough[:, k] = (bucket.num_frames == 1) | (fps * RATE_SLACK >= bucket.fps)
                scale = np.maximum(bucket.height / height, bucket.width / width)
                large_enough[:, k] = scale <= SIZE_SLACK
        clip_ratio = np.array(list(map(math.log, (width / height).tolist())))
        bucket_ratio = np.array([math.log(bucket.width / bucket.height) for bucket in buckets])
        mismatch = np.abs(clip_ratio[:, None] - bucket_ratio[None])
        uncut = 1 - np.exp(-mismatch) <= rules.max_crop + 1e-9  # rounding
        # The aspect ratios of one resolution share a draw: otherwise a clip that one of them leaves would go to the
        # next, instead of to a smaller bucket.
        draws = rng.random(shape)[:, _leaders(buckets)]
        drawn = draws < np.array([bucket.keep_probability for bucket in buckets])
        return cls(
            long_enough,
            large_enough,
            fast_enough,
            mismatch,
            uncut,
            drawn,
            clips.weight[part, None] > 0,
            buckets,
            rules.bucket_choice,
        )

    @property
    def images(self) -> np.ndarray:
        """Whether a bucket is one of images, [K]."""
        return np.array([bucket.num_frames == 1 for bucket in self.buckets])

    @property
    def fills(self) -> np.ndarray:
        """Whether a clip can fill a bucket, however much of it is cut."""
        return self.long_enough & self.large_enough & self.fast_enough

    @property
    def off_aspect(self) -> np.ndarray:
        """Whether a bucket cuts clearly more of a clip than another that it fills, of those for videos or images."""
        crop, fits = 1 - np.exp(-self.mismatch), self.fills & self.uncut
        off = np.empty(fits.shape, bool)
        for kind in (self.images, ~self.images):
            least = np.where(fits[:, kind], crop[:, kind], np.inf).min(axis=1, initial=np.inf, keepdims=True)
            off[:, kind] = crop[:, kind] > least + SAME_ASPECT
        return off

    def choose(self) -> np.ndarray:
        """Return each clip's bucket, int64 [N]; -1 - r if none takes it because of REASONS[r]."""
        fits = self.fills & self.uncut
        kept = fits & self.drawn
        taken = kept & self.weighted
        preference = np.array(resolution_ranks(self.buckets)) + self.mismatch / (1 + self.mismatch)
        if self.bucket_choice == "aspect":  # counts more than the rank, which is below K
            preference += len(self.buckets) * (2 * self.images + self.off_aspect)
        choice = np.where(taken, preference, np.inf).argmin(axis=1)  # [N]
        tests = (self.long_enough, self.large_enough, self.fast_enough, self.fills, fits, kept, taken)
        reasons = np.stack([~passed.any(axis=1) for passed in tests])  # [R N], in the order of REASONS
        return np.where(reasons[-1], -1 - reasons.argmax(axis=0), choice)


def window_counts(clips: Clips, choice: np.ndarray, buckets: Sequence[Bucket]) -> np.ndarray:
    """Return how many windows each clip gives, int64 [N]: how often it fills its bucket, from 1 to max_windows.

    Args:
        choice: result of `Fit.choose`.
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


def resolution_ranks(buckets: Sequence[Bucket]) -> list[int]:
    """Return the rank of each bucket by volume, largest first; aspect ratios of one resolution share a rank."""
    ranks = [0] * len(buckets)
    rank, leader = -1, None
    for k in _by_volume(buckets):
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


def _leaders(buckets: Sequence[Bucket]) -> list[int]:
    """Return for each bucket the place of the largest bucket of its resolution."""
    ranks, first = resolution_ranks(buckets), dict[int, int]()
    for k in _by_volume(buckets):
        first.setdefault(ranks[k], k)
    return [first[rank] for rank in ranks]


def _by_volume(buckets: Sequence[Bucket]) -> list[int]:
    """Return the places of the buckets, the largest first."""
    return sorted(range(len(buckets)), key=lambda k: (-buckets[k].volume, -buckets[k].num_frames))


def _frames(clip: Clip, buckets: Sequence[Bucket], rules: BucketRules) -> str:
    shortest = min(buckets, key=lambda bucket: (bucket.seconds, bucket.num_frames))
    frames = int(resampled_frames(clip.num_frames, clip.fps, shortest.fps))
    return f"{frames} frames at {shortest.fps:g} fps, the shortest bucket needs {shortest.num_frames}"


def _pixels(clip: Clip, buckets: Sequence[Bucket], rules: BucketRules) -> str:
    smallest = min(buckets, key=lambda bucket: bucket.height * bucket.width)
    return (
        f"{clip.width}x{clip.height} pixels (width x height), the smallest bucket needs "
        f"{smallest.width}x{smallest.height}; data.allow_upscale enlarges"
    )


def _rate(clip: Clip, buckets: Sequence[Bucket], rules: BucketRules) -> str:
    slowest = min(bucket.fps for bucket in buckets)
    return f"{clip.fps:g} fps, the slowest bucket needs {slowest:g}; data.allow_upscale repeats frames"


def _all_three(clip: Clip, buckets: Sequence[Bucket], rules: BucketRules) -> str:
    return f"{clip.num_frames} frames of {clip.width}x{clip.height} at {clip.fps:g} fps"


def _crop(clip: Clip, buckets: Sequence[Bucket], rules: BucketRules) -> str:
    (fills,) = Fit.of(Clips.of([clip]), slice(1), buckets, rules, np.random.default_rng(0)).fills
    best = min(
        (bucket for bucket, filled in zip(buckets, fills, strict=True) if filled),
        key=lambda bucket: float(cropped_share(clip.width, clip.height, bucket)),
    )
    share = float(cropped_share(clip.width, clip.height, best))
    return (
        f"{share:.0%} of {clip.width}x{clip.height} pixels (width x height) to fill {best}, and data.max_crop is "
        f"{rules.max_crop:g}; add a bucket of its aspect_ratio"
    )


def _none(clip: Clip, buckets: Sequence[Bucket], rules: BucketRules) -> str:
    return ""


REASONS: dict[str, Callable[[Clip, Sequence[Bucket], BucketRules], str]] = {
    "too short": _frames,
    "too small": _pixels,
    "frame rate too low": _rate,
    "no bucket is short, small and slow enough at once": _all_three,
    "too much would be cut": _crop,
    "excluded by keep_probability": _none,
    "its weight is 0": _none,
}
"""Reasons for which no bucket takes a clip, in the order in which they are tested, and functions for the detail."""


class Dropped(Sequence[tuple[Clip, str]]):
    """Clips that fit no bucket, each with the reason, whose text is made on access."""

    def __init__(
        self,
        clips: Clips,
        buckets: Sequence[Bucket],
        rules: BucketRules,
        places: np.ndarray,
        reasons: np.ndarray,
    ) -> None:
        """
        Args:
            clips: all clips, as the manifest has them.
            places: indices of the dropped clips in `clips`, ascending.
            reasons: for each an index into REASONS.
        """
        self.clips, self.buckets, self.rules = clips, buckets, rules
        self.places, self.reasons = places, reasons

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> tuple[Clip, str]: ...
    @overload
    def __getitem__(self, index: slice) -> "Dropped": ...
    def __getitem__(self, index: int | slice) -> "tuple[Clip, str] | Dropped":
        if isinstance(index, slice):
            return Dropped(self.clips, self.buckets, self.rules, self.places[index], self.reasons[index])
        clip = self.clips[int(self.places[index])]
        kind = list(REASONS)[self.reasons[index]]
        detail = REASONS[kind](clip, self.buckets, self.rules)
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
