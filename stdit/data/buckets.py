"""Buckets: the sizes of clip that are trained on, and which clip goes into which.

A batch has one size, so clips are sorted into buckets of frames x height x width before training. Letters: N
clips, K buckets.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from stdit.data.config import BucketConfig, resolve_size
from stdit.data.decoding.media import without_secrets
from stdit.data.fit import Dropped, choose, divided, resampled_frames, window_counts
from stdit.data.manifest.clips import Clip, Clips
from stdit.data.manifest.reading import Skipped, summarise
from stdit.errors import UserError

__all__ = ["Assignment", "Bucket", "assign", "resampled_frames", "resolve_size"]

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
    windows: int = 1
    """Most parts that one clip is divided into."""
    max_tokens: int | None = None
    """Of a batch; what fits is known once codec and model are: see `sized`."""
    tokens: int | None = None
    """Of a clip, once known."""

    @classmethod
    def from_config(cls, config: BucketConfig) -> "Bucket":
        """Raises UserError for an impossible value."""
        config.validate()
        height, width = config.size()
        return cls(
            config.num_frames,
            height,
            width,
            config.fps,
            config.batch_size,
            config.keep_probability,
            config.windows,
            config.max_tokens,
        )

    def sized(self, tokens: int) -> "Bucket":
        """The bucket when a clip has so many tokens: max_tokens, if given, says how many are a batch."""
        size = self.batch_size if self.max_tokens is None else max(1, self.max_tokens // tokens)
        return replace(self, batch_size=size, tokens=tokens)

    @property
    def volume(self) -> int:
        """Frames x pixels of a frame."""
        return self.num_frames * self.height * self.width

    @property
    def seconds(self) -> float:
        return self.num_frames / self.fps

    def __str__(self) -> str:
        return f"{self.num_frames}x{self.height}x{self.width} at {self.fps:g} fps"


@dataclass
class Assignment:
    """Which clips train in which bucket, and which do not train."""

    clips: Clips
    """Of a clip that serves several windows, each part by itself."""
    buckets: list[Bucket]
    members: list[np.ndarray]
    """For each bucket the indices of its clips in `clips`, ascending; may be empty."""
    dropped: Dropped
    skipped: list[Skipped] = field(default_factory=list)
    """Files that the manifest names but that could not be used."""
    part: np.ndarray | None = None
    """For each of `clips` its number among the parts of its clip; None: there are none but whole clips."""
    remarks: list[str] = field(default_factory=list)
    """What is odd about the manifest's clips, though they can be used."""

    @property
    def kept(self) -> int:
        return sum(len(members) for members in self.members)

    @property
    def files(self) -> int:
        """Different files that train: fewer than clips where scenes or windows share one."""
        return len(np.unique(self.clips.files[np.concatenate(self.members)]))

    @property
    def whole(self) -> list[int]:
        """For each bucket its clips, those that serve several windows counted once."""
        part = self.part
        if part is None:
            return [len(members) for members in self.members]
        return [int((part[members] == 0).sum()) for members in self.members]

    def weights(self, bucket: int) -> np.ndarray | None:
        """How often each clip of a bucket is drawn in an epoch, float64; None: each once."""
        weights = self.clips.weight[self.members[bucket]]
        return None if (weights == 1).all() else weights

    def draws(self, bucket: int) -> int:
        """Clips that a bucket draws in one epoch: the sum of its clips' weights, rounded, but one at least if it has
        any."""
        weights = self.weights(bucket)
        return len(self.members[bucket]) if weights is None else max(1, round(float(weights.sum())))

    def steps(self, bucket: int) -> int:
        """Batches of a bucket in one epoch; the last is filled up with clips from the start."""
        return math.ceil(self.draws(bucket) / self.buckets[bucket].batch_size)

    def table(self) -> str:
        """What each bucket holds, where it comes from, and what was left out and why, for people.

        Windows, draws and tokens are shown where they say something.
        """
        draws, windows = [self.draws(k) for k in range(len(self.buckets))], list(map(len, self.members))
        columns = {"clips": self.whole}
        if self.part is not None:
            columns["windows"] = windows
        if draws != windows:
            columns["drawn"] = draws
        columns["batch"] = [bucket.batch_size for bucket in self.buckets]
        columns["steps an epoch"] = [self.steps(k) for k in range(len(self.buckets))]
        if any(bucket.max_tokens for bucket in self.buckets):
            columns["tokens"] = [bucket.batch_size * (bucket.tokens or 0) for bucket in self.buckets]
            columns["max_tokens"] = [bucket.max_tokens or 0 for bucket in self.buckets]
        widths = [max(9, len(name) + 2) for name in columns]
        lines = [_line("bucket (frames x height x width)", columns, widths)]
        for bucket, *numbers in zip(self.buckets, *columns.values(), strict=True):
            lines.append(_line(str(bucket), numbers, widths))
        return "\n".join([*lines, *self.sources(), *self.left_out()])

    def sources(self) -> list[str]:
        """Of data from several places, or with weights, how much each gives, for people."""
        members = np.concatenate(self.members)
        roots, weights = self.clips.root[members], self.clips.weight[members]
        what, lines = "clips" if self.part is None else "windows", []
        for place in np.unique(roots).tolist():
            chosen = weights[roots == place]
            least, most = float(chosen.min()), float(chosen.max())
            weight = f"{least:g}" if least == most else f"{least:g} to {most:g}"
            where = f"{len(chosen)} {what} from {without_secrets(str(self.clips.roots[place]))}"
            lines.append(f"{where}, weight {weight}: {chosen.sum():.0f} draws an epoch")
        return [] if len(lines) == 1 and (weights == 1).all() else lines

    def left_out(self) -> list[str]:
        lines = []
        if self.dropped:
            lines.append(f"{len(self.dropped)} clips dropped, since no bucket takes them:")
            lines += self.dropped.summary()
        if self.skipped:
            lines.append(f"{len(self.skipped)} entries of the manifest skipped:")
            lines += summarise(self.skipped)
        return lines + self.remarks


def _line(name: str, cells: Iterable[object], widths: Sequence[int]) -> str:
    """A line of a table, its cells to the right of their columns."""
    return f"{name:<36}" + "".join(f"{cell!s:>{width}}" for cell, width in zip(cells, widths, strict=True))


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

    A bucket with `windows` above 1 divides a clip that is n times as long as its window into n equal parts, at most
    that many, which are clips of their own from then on: each is drawn as often as its clip's weight says, with a
    window drawn within the part. So windows of one epoch do not overlap.

    Raises UserError when no clip is left, with the reasons.
    """
    assert buckets, "at least one bucket"
    clips = clips if isinstance(clips, Clips) else Clips.of(clips)
    rng = np.random.default_rng(np.random.SeedSequence([seed, KEEP_STREAM]))
    choice = np.empty(len(clips), np.int16)  # [N]; below 0: none, -1 - place in REASONS
    for begin in range(0, len(clips), CLIPS_AT_ONCE):
        part = slice(begin, begin + CLIPS_AT_ONCE)
        choice[part] = choose(clips, part, buckets, allow_upscale, rng)
    places = np.flatnonzero(choice < 0)
    dropped = Dropped(clips, buckets, places, -1 - choice[places])
    number, counts = None, window_counts(clips, choice, buckets)
    if counts.max(initial=1) > 1:
        clips, number = divided(clips, counts)
        choice = np.repeat(choice, counts)
    members = [np.flatnonzero(choice == k) for k in range(len(buckets))]
    assignment = Assignment(clips, list(buckets), members, dropped, list(skipped), number)
    if not assignment.kept:
        rule = "no clip is left to train on: change data.buckets (fewer frames, fewer pixels, lower fps)"
        raise UserError("\n".join([rule, *assignment.left_out()]))
    return assignment
