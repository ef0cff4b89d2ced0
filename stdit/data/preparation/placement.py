"""A table for people: which bucket each clip of a manifest goes to, and why, or why it is dropped or skipped."""

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from stdit.data.assignment import Assignment, fits_of
from stdit.data.buckets import Bucket
from stdit.data.decoding.media import Media
from stdit.data.fit import Fit, cropped_share, resolution_ranks, window_counts
from stdit.data.manifest.clips import Clip
from stdit.data.preparation.table import staged_output
from stdit.errors import listed

COLUMNS = (
    *("path", "start", "end", "num_frames", "fps", "width", "height"),
    *("bucket", "windows", "cut", "reason"),
)
MAX_NAMED = 3
"""Buckets that a reason names; the others are counted."""
_SUITS = 0
_WHY_NOT = (
    *("", "too short", "too small", "frame rate too low"),
    *("cuts more than data.max_crop", "cuts more", "left by keep_probability"),
)
"""Why a bucket that is larger than a clip's own did not take it, after `_SUITS`."""


def write_placements(assignment: Assignment, path: Path) -> None:
    """Write a CSV with a row per clip, and per row of the manifest that is skipped.

    Columns: the clip (path, start and end in seconds, num_frames, fps, width and height in pixels), its bucket (empty
    if none takes it), the number of temporal windows that it gives, the share of its picture that is cut, the reason.

    Raises:
        UserError: if the file cannot be written.
    """
    with (
        staged_output(path) as staging,
        staging.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(_rows(assignment))


def _rows(assignment: Assignment) -> Iterator[list[object]]:
    """Yield the rows in the order of the manifest, then those of files that are skipped."""
    dropped, buckets = assignment.dropped, assignment.buckets
    clips = dropped.clips  # before they are split into windows
    unreadable = dict(assignment.skipped)
    one_root = len(np.unique(clips.root)) == 1
    name = (lambda media: media.name) if one_root else str  # the same name may be in two roots
    why_dropped = {int(place): index for index, place in enumerate(dropped.places)}
    for part, fit in fits_of(clips, buckets, dropped.rules, assignment.seed):
        choice = fit.choose()
        texts, which = _reasons(fit, choice)
        windows = window_counts(clips[part], choice, buckets)
        for row, place in enumerate(range(len(clips))[part]):
            clip, k = clips[place], int(choice[row])
            if k < 0:
                taken = ["", "", "", dropped[why_dropped[place]][1]]
            elif len(assignment.members[k]) == 0:  # none of its clips can be read
                taken = ["", "", "", unreadable.pop(str(clip.media), "its bucket is dropped")]
            else:
                cut = float(cropped_share(clip.width, clip.height, buckets[k]))
                taken = [str(buckets[k]), str(windows[row]), f"{cut:.3f}", texts[which[row]]]
            yield [*_facts(clip, name), *taken]
    for path, reason in unreadable.items():
        yield [path, *[""] * (len(COLUMNS) - 2), reason]


def _facts(clip: Clip, name: Callable[[Media], str]) -> list[object]:
    """Return the cells that describe a clip."""
    start, end, fps = f"{clip.start:g}", "" if clip.end is None else f"{clip.end:g}", f"{clip.fps:g}"
    return [name(clip.media), start, end, clip.num_frames, fps, clip.width, clip.height]


def _reasons(fit: Fit, choice: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Return the different reasons for a choice of buckets, and for each clip the place of its own, int64 [N]."""
    by_aspect = fit.bucket_choice == "aspect"
    least_cut = ~fit.off_aspect if by_aspect else np.ones(fit.drawn.shape, bool)
    tests = (fit.long_enough, fit.large_enough, fit.fast_enough, fit.uncut, least_cut, fit.drawn)
    failed = np.stack([np.zeros(fit.drawn.shape, bool), *map(np.logical_not, tests)])
    codes = np.concatenate([choice[:, None], failed.argmax(axis=0)], axis=1, dtype=np.int16)  # [N 1+K]
    different, which = np.unique(codes, axis=0, return_inverse=True)
    ranks = resolution_ranks(fit.buckets)
    return [_reason(k, why, fit.buckets, ranks) for k, *why in different.tolist()], which.ravel()


def _reason(k: int, why: Sequence[int], buckets: Sequence[Bucket], ranks: Sequence[int]) -> str:
    """Say why a clip is in bucket k: what kept it from larger ones.

    Args:
        why: for each bucket the first test that the clip fails; `_SUITS`: none.
    """
    if k < 0:
        return ""
    named: dict[str, list[str]] = {}
    for other, code in enumerate(why):
        if ranks[other] < ranks[k] and code != _SUITS:
            named.setdefault(_WHY_NOT[code], []).append(str(buckets[other]))
    if not named:
        return "the largest bucket" if ranks[k] == 0 else "videos go to buckets of videos"
    return "not in a larger bucket: " + "; ".join(
        f"{name}: {listed(them[:MAX_NAMED], len(them))}" for name, them in named.items()
    )
