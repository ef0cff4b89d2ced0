"""Buckets: the sizes of clip that are trained on, and which clip goes into which.

A batch has one size, so clips are sorted into buckets of frames x height x width before training. Letters: N
clips, K buckets.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import overload

import numpy as np

from stdit.data.clips import Clip, Clips
from stdit.data.config import BucketConfig, resolve_size
from stdit.data.manifest import EXAMPLES, Kind, Skipped, summarise, summary_lines
from stdit.errors import UserError

__all__ = ["Assignment", "Bucket", "assign", "resampled_frames", "resolve_size"]

# Clips of 424 x 240 serve a bucket of 426 x 240, and 29.97 fps one of 30.
SIZE_SLACK = 1.02
RATE_SLACK = 1.1

# Buckets of equal length whose sizes differ by less than this are one resolution in several aspect ratios.
SAME_RESOLUTION = 0.9

CLIPS_AT_ONCE = 65536
"""That are assigned together, to bound memory."""

KEEP_STREAM = 0x6B656570
"""Keeps the draws of keep_probability apart from the plan's, which use the same seed."""


@dataclass(frozen=True)
class Bucket:
    """Clips of one size: frames, pixels, frames per second; `batch_size` of them are one step."""

    num_frames: int
    height: int
    width: int
    fps: float
    batch_size: int = 1
    keep_probability: float = 1.0

    @classmethod
    def from_config(cls, config: BucketConfig) -> "Bucket":
        """Raises UserError for an impossible value."""
        config.validate()
        height, width = config.size()
        return cls(config.num_frames, height, width, config.fps, config.batch_size, config.keep_probability)

    @property
    def volume(self) -> int:
        """Frames x pixels of a frame."""
        return self.num_frames * self.height * self.width

    @property
    def seconds(self) -> float:
        return self.num_frames / self.fps

    def __str__(self) -> str:
        return f"{self.num_frames}x{self.height}x{self.width} at {self.fps:g} fps"


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
    "left out by keep_probability": lambda clip, buckets: "",
}
"""Why a clip may fit no bucket, the first that holds, and what to say of it."""


class Dropped(Sequence[tuple[Clip, str]]):
    """Clips that fit no bucket, each with the reason, which is put into words when it is asked for."""

    def __init__(
        self, clips: Clips, buckets: Sequence[Bucket], places: np.ndarray, reasons: np.ndarray
    ) -> None:
        """Of the clips at `places`, ascending; `reasons` are places in REASONS."""
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
        """A line for each kind of reason, for people."""
        codes, firsts = np.unique(self.reasons, return_index=True)
        kinds = {}
        for code in codes[firsts.argsort()].tolist():
            places = np.flatnonzero(self.reasons == code)
            cases = [self[place] for place in places[:EXAMPLES].tolist()]
            kind = list(REASONS)[code]
            kinds[kind] = Kind(len(places), [Skipped(str(clip.media), reason) for clip, reason in cases])
        return summary_lines(kinds)


@dataclass
class Assignment:
    """Which clips train in which bucket, and which do not train."""

    clips: Clips
    buckets: list[Bucket]
    members: list[np.ndarray]
    """For each bucket the indices of its clips in `clips`, ascending; may be empty."""
    dropped: Dropped
    skipped: list[Skipped] = field(default_factory=list)
    """Files that the manifest names but that could not be used."""

    @property
    def kept(self) -> int:
        return sum(len(members) for members in self.members)

    def steps(self, bucket: int) -> int:
        """Batches of a bucket in one epoch; the last is filled up with clips from the start."""
        return math.ceil(len(self.members[bucket]) / self.buckets[bucket].batch_size)

    def table(self) -> str:
        """What each bucket holds and what was left out and why, for people."""
        lines = [f"{'bucket (frames x height x width)':<36}{'clips':>9}{'batch':>7}{'steps an epoch':>16}"]
        for index, (bucket, members) in enumerate(zip(self.buckets, self.members, strict=True)):
            lines.append(f"{bucket!s:<36}{len(members):>9}{bucket.batch_size:>7}{self.steps(index):>16}")
        return "\n".join(lines + self.left_out())

    def left_out(self) -> list[str]:
        lines = []
        if self.dropped:
            lines.append(f"{len(self.dropped)} clips dropped, since no bucket takes them:")
            lines += self.dropped.summary()
        if self.skipped:
            lines.append(f"{len(self.skipped)} entries of the manifest skipped:")
            lines += summarise(self.skipped)
        return lines


def resampled_frames(num_frames: int | np.ndarray, fps: float | np.ndarray, target_fps: float) -> np.ndarray:
    """Frames that a clip gives at another rate, to the nearest; at least one."""
    return np.maximum(1, np.floor(np.asarray(num_frames) * target_fps / np.asarray(fps) + 0.5)).astype(
        np.int64
    )


def assign(
    clips: Clips | Iterable[Clip],
    buckets: Sequence[Bucket],
    seed: int = 0,
    allow_upscale: bool = False,
    skipped: Sequence[Skipped] = (),
) -> Assignment:
    """Each clip to the largest bucket (frames x area) that it can fill, of the nearest aspect ratio.

    It fills a bucket when it has enough frames after resampling and need not be enlarged, nor its frames
    repeated, to cover it (both unless `allow_upscale`). A bucket takes it with its keep_probability, drawn
    from (seed, place in `clips`); else the next smaller one is asked.

    Raises UserError when no clip is left, with the reasons.
    """
    assert buckets, "at least one bucket"
    clips = clips if isinstance(clips, Clips) else Clips.of(clips)
    rng = np.random.default_rng(np.random.SeedSequence([seed, KEEP_STREAM]))
    choice = np.empty(len(clips), np.int16)  # [N]; below 0: none, -1 - place in REASONS
    for begin in range(0, len(clips), CLIPS_AT_ONCE):
        part = slice(begin, begin + CLIPS_AT_ONCE)
        choice[part] = _choose(
            clips.num_frames[part],
            clips.fps[part],
            clips.height[part],
            clips.width[part],
            buckets,
            allow_upscale,
            rng,
        )
    places = np.flatnonzero(choice < 0)
    dropped = Dropped(clips, buckets, places, -1 - choice[places])
    members = [np.flatnonzero(choice == k) for k in range(len(buckets))]
    assignment = Assignment(clips, list(buckets), members, dropped, list(skipped))
    if not assignment.kept:
        rule = "no clip is left to train on: change data.buckets (fewer frames, fewer pixels, lower fps)"
        raise UserError("\n".join([rule, *assignment.left_out()]))
    return assignment


def _choose(
    num_frames: np.ndarray,
    fps: np.ndarray,
    height: np.ndarray,
    width: np.ndarray,
    buckets: Sequence[Bucket],
    allow_upscale: bool,
    rng: np.random.Generator,
) -> np.ndarray:
    """For each clip [N] the place of its bucket; if none takes it, -1 - the place of the reason in REASONS.

    The draws for keep_probability are the next N x K of `rng`.
    """
    long_enough, fast_enough, large_enough = (np.ones((len(fps), len(buckets)), bool) for _ in range(3))
    for k, bucket in enumerate(buckets):
        long_enough[:, k] = resampled_frames(num_frames, fps, bucket.fps) >= bucket.num_frames
        if not allow_upscale:
            fast_enough[:, k] = (bucket.num_frames == 1) | (fps * RATE_SLACK >= bucket.fps)
            scale = np.maximum(bucket.height / height, bucket.width / width)
            large_enough[:, k] = scale <= SIZE_SLACK
    fits = long_enough & fast_enough & large_enough
    draws = rng.random(fits.shape)
    taken = fits & (draws < np.array([bucket.keep_probability for bucket in buckets]))

    clip_ratio = np.array(list(map(math.log, (width / height).tolist())))
    bucket_ratio = np.array([math.log(bucket.width / bucket.height) for bucket in buckets])
    mismatch = np.abs(clip_ratio[:, None] - bucket_ratio[None])  # [N K]
    preference = _resolution_rank(buckets) + mismatch / (1 + mismatch)
    choice = np.where(taken, preference, np.inf).argmin(axis=1)  # [N]

    reasons = np.stack(  # [R N], in the order of REASONS
        [~passed.any(axis=1) for passed in (long_enough, large_enough, fast_enough, fits, taken)]
    )
    return np.where(reasons[-1], -1 - reasons.argmax(axis=0), choice)


def _resolution_rank(buckets: Sequence[Bucket]) -> np.ndarray:
    """For each bucket its rank by volume, largest first; one rank for one resolution in several aspect
    ratios."""
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
