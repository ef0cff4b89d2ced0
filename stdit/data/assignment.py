"""Assign clips to buckets. Letters: N clips, K buckets."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from stdit.data.buckets import Bucket
from stdit.data.decoding.media import without_secrets
from stdit.data.fit import BucketRules, Dropped, Fit, cropped_share, split_into_windows, window_counts
from stdit.data.manifest.clips import Clip, Clips
from stdit.data.manifest.media_kinds import media_lines
from stdit.data.manifest.reading import Skipped, summarise
from stdit.data.manifest.rows import MEDIA_COLUMNS
from stdit.errors import UserError

CLIPS_PER_CHUNK = 65536
"""Clips that are assigned together, to bound memory."""

SHOWN_CROP = 0.01
"""The report is silent about less: sizes of buckets are rounded."""

KEEP_STREAM = 0x6B656570
"""Separates the draws of keep_probability from those of the plan, which uses the same seed."""


@dataclass
class Assignment:
    """Which clips train in which bucket, and which are dropped."""

    clips: Clips
    """All clips; a clip that is split into temporal windows is one entry per window."""
    buckets: list[Bucket]
    members: list[np.ndarray]
    """For each bucket the indices of its clips in `clips`, ascending; may be empty."""
    dropped: Dropped
    skipped: list[Skipped] = field(default_factory=list)
    """Rows of the manifest whose files cannot be used, with the reason."""
    window_index: np.ndarray | None = None
    """For each of `clips` its number among the windows of its clip, int64 [N]; None: no clip is split."""
    warnings: list[str] = field(default_factory=list)
    """Oddities of the manifest, for people."""
    seed: int = 0
    """Of the draws for keep_probability."""
    regularisation: np.ndarray | None = None
    """For each of `clips` whether it is one of data.regularisation, bool [N]; None: none is."""

    @property
    def used_buckets(self) -> list[Bucket]:
        """The buckets that have clips."""
        return [bucket for bucket, members in zip(self.buckets, self.members, strict=True) if len(members)]

    @property
    def kept(self) -> int:
        """Number of clips (or windows) that train."""
        return sum(len(members) for members in self.members)

    @property
    def files(self) -> int:
        """Number of different files that train: fewer than clips if scenes or windows share one."""
        return len(np.unique(self.clips.files[np.concatenate(self.members)]))

    @property
    def clip_counts(self) -> list[int]:
        """Number of clips of each bucket; a clip that is split into windows counts once."""
        window_index = self.window_index
        if window_index is None:
            return [len(members) for members in self.members]
        return [int((window_index[members] == 0).sum()) for members in self.members]

    def weights(self, bucket: int) -> np.ndarray | None:
        """Return how often each clip of a bucket is drawn per epoch, float64; None if each is drawn once."""
        weights = self.clips.weight[self.members[bucket]]
        return None if (weights == 1).all() else weights

    def is_regularisation(self, places: np.ndarray) -> np.ndarray:
        """Return for places in `clips` whether the clip is one of data.regularisation, bool."""
        return np.zeros(len(places), bool) if self.regularisation is None else self.regularisation[places]

    def with_regularisation(self, own: int, share: float) -> "Assignment":
        """Return the assignment with all but the first clips of the manifests as regularisation.

        Args:
            own: number of clips, before they were split into windows, that are none.
            share: of the others in an epoch, which determines their weight.

        Raises:
            UserError: if one of the two kinds has no clip in a bucket.
        """
        count = len(self.clips)
        starts = np.ones(count, bool) if self.window_index is None else self.window_index == 0
        regularisation = np.cumsum(starts) > own
        kept = np.concatenate(self.members)
        mixed, weights = regularisation[kept], self.clips.weight.copy()
        for kind, name in ((~mixed, "data.manifest"), (mixed, "data.regularisation")):
            if not kind.any():
                rule = f"{name}: no bucket takes one of its clips, so that they cannot have their share"
                raise UserError("\n".join([rule, *self.exclusions()]))
        weights[regularisation] = share / (1 - share) * weights[kept[~mixed]].sum() / mixed.sum()
        return replace(self, clips=replace(self.clips, weight=weights), regularisation=regularisation)

    def draws_per_epoch(self, bucket: int) -> int:
        """Return how many clips a bucket draws per epoch: the rounded sum of its weights, at least 1."""
        weights = self.weights(bucket)
        return len(self.members[bucket]) if weights is None else max(1, round(float(weights.sum())))

    def steps_per_epoch(self, bucket: int) -> int:
        """Return the number of batches of a bucket per epoch; the last one is filled up with clips from the start."""
        return math.ceil(self.draws_per_epoch(bucket) / self.buckets[bucket].batch_size)

    def table(self) -> str:
        """Return a report for people: what each bucket holds, the sources, and what is dropped or skipped and why.

        The columns for windows, draws and tokens appear only if they differ from the others, the lines about cropping
        only if something is cut.
        """
        draws, windows = (
            [self.draws_per_epoch(k) for k in range(len(self.buckets))],
            list(map(len, self.members)),
        )
        columns = {"clips": self.clip_counts}
        if self.window_index is not None:
            columns["windows"] = windows
        if draws != windows:
            columns["drawn"] = draws
        columns["batch"] = [bucket.batch_size for bucket in self.buckets]
        columns["steps/epoch"] = [self.steps_per_epoch(k) for k in range(len(self.buckets))]
        if any(bucket.max_tokens for bucket in self.buckets):
            columns["tokens"] = [bucket.batch_size * (bucket.tokens or 0) for bucket in self.buckets]
            columns["max_tokens"] = [bucket.max_tokens or 0 for bucket in self.buckets]
        widths = [max(9, len(name) + 2) for name in columns]
        lines = [_line("bucket (frames x height x width)", columns, widths)]
        for bucket, *numbers in zip(self.buckets, *columns.values(), strict=True):
            lines.append(_line(str(bucket), numbers, widths))
        return "\n".join(
            [*lines, *self.crop_lines(), *self.source_lines(), *self.media_lines(), *self.exclusions()]
        )

    def cropped_shares(self, bucket: int) -> np.ndarray:
        """Return the share of the picture that a bucket cuts away from each of its clips, float64."""
        members = self.members[bucket]
        return cropped_share(self.clips.width[members], self.clips.height[members], self.buckets[bucket])

    def crop_lines(self) -> list[str]:
        """Return a line per bucket that cuts its clips: the share of the picture, and the clip that loses most."""
        lines = []
        for k, bucket in enumerate(self.buckets):
            shares = self.cropped_shares(k)
            if (shares > SHOWN_CROP).any():
                clip = self.clips[int(self.members[k][shares.argmax()])]
                lines.append(
                    f"  {bucket}: {shares.mean():.0%} of the picture on average, at most {shares.max():.0%} "
                    f"({clip.media}, {clip.width}x{clip.height} pixels)"
                )
        return lines and ["cut away for the bucket's aspect ratio (data.max_crop is the limit):", *lines]

    def media_lines(self) -> list[str]:
        """Return lines about clips that are HDR, interlaced or damaged, as far as the manifest says."""
        members = np.concatenate(self.members)
        if self.window_index is not None:
            members = members[self.window_index[members] == 0]
        given = {name: self.clips.extra[name] for name in MEDIA_COLUMNS if name in self.clips.extra}
        return media_lines({name: column.take(members) for name, column in given.items()})

    def source_lines(self) -> list[str]:
        """Return a line per data root with its number of clips and draws; empty for one root without weights."""
        members = np.concatenate(self.members)
        roots, weights = self.clips.root[members], self.clips.weight[members]
        mixed = self.is_regularisation(members)
        what, lines = "clips" if self.window_index is None else "windows", []
        for place in np.unique(roots).tolist():
            chosen = weights[roots == place]
            least, most = float(chosen.min()), float(chosen.max())
            weight = f"{least:g}" if least == most else f"{least:g} to {most:g}"
            where = f"{len(chosen)} {what} from {without_secrets(str(self.clips.roots[place]))}"
            lines.append(f"{where}, weight {weight}: {chosen.sum():.0f} draws per epoch")
        if mixed.any():
            part = weights[mixed].sum()
            lines.append(
                f"{mixed.sum()} of them are of data.regularisation: {part:.1f} of {weights.sum():.1f} draws"
            )
        return [] if len(lines) == 1 and (weights == 1).all() else lines

    def exclusions(self) -> list[str]:
        """Return lines about dropped clips, skipped rows and oddities of the manifest."""
        lines = []
        if self.dropped:
            lines.append(f"{len(self.dropped)} clips dropped because no bucket takes them:")
            lines += self.dropped.summary()
        if self.skipped:
            lines.append(f"{len(self.skipped)} entries of the manifest skipped:")
            lines += summarise(self.skipped)
        return lines + self.warnings


def _line(name: str, cells: Iterable[object], widths: Sequence[int]) -> str:
    """Format a line of a table; cells are aligned to the right."""
    return f"{name:<36}" + "".join(f"{cell!s:>{width}}" for cell, width in zip(cells, widths, strict=True))


def assign_clips(
    clips: Clips | Iterable[Clip],
    buckets: Sequence[Bucket],
    seed: int = 0,
    allow_upscale: bool = False,
    skipped: Sequence[Skipped] = (),
    bucket_choice: Literal["aspect", "size"] = "size",
    max_crop: float = 1.0,
) -> Assignment:
    """Assign each clip to the bucket that suits it best among those that it can fill.

    A clip fills a bucket if it has enough frames after resampling and, unless `allow_upscale`, is neither enlarged
    nor has frames repeated, and if at most `max_crop` of its picture is cut for the bucket's aspect ratio.

    Of these, "size" takes the largest (frames x area), in the nearest aspect ratio of its resolution: Open-Sora's
    rule. "aspect" takes the largest of those that cut least, to within a twentieth of the picture. For videos, all
    buckets of videos come before those of images.

    A bucket takes a clip with probability `keep_probability`, drawn from (seed, place in `clips`) once for all aspect
    ratios of a resolution; otherwise the next best bucket is tried.

    A bucket with `max_windows` above 1 splits a clip that is n times as long into min(n, max_windows) equal parts.
    Each part is a clip of its own from then on, with the weight of its clip, so windows of one epoch do not overlap.

    Raises UserError, with the reasons, if no clip is left.
    """
    assert buckets, "at least one bucket"
    clips = clips if isinstance(clips, Clips) else Clips.of(clips)
    rules = BucketRules(allow_upscale, bucket_choice, max_crop)
    choice = np.empty(len(clips), np.int16)  # [N]; below 0: none, -1 - place in REASONS
    for part, fit in fits_of(clips, buckets, rules, seed):
        choice[part] = fit.choose()
    places = np.flatnonzero(choice < 0)
    dropped = Dropped(clips, buckets, rules, places, -1 - choice[places])
    number, counts = None, window_counts(clips, choice, buckets)
    if counts.max(initial=1) > 1:
        clips, number = split_into_windows(clips, counts)
        choice = np.repeat(choice, counts)
    members = [np.flatnonzero(choice == k) for k in range(len(buckets))]
    assignment = Assignment(clips, list(buckets), members, dropped, list(skipped), number, seed=seed)
    if not assignment.kept:
        rule = "no clip is left to train on: change data.buckets (fewer frames, fewer pixels, lower fps)"
        raise UserError("\n".join([rule, *assignment.exclusions()]))
    return assignment


def fits_of(
    clips: Clips, buckets: Sequence[Bucket], rules: BucketRules, seed: int
) -> Iterator[tuple[slice, Fit]]:
    """Yield parts of a table of clips, each with what the buckets can take of it."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, KEEP_STREAM]))
    for begin in range(0, len(clips), CLIPS_PER_CHUNK):
        part = slice(begin, begin + CLIPS_PER_CHUNK)
        yield part, Fit.of(clips, part, buckets, rules, rng)
