"""The batch plan: which clips make up the global batch of any step.

A pure function of (seed, manifest, buckets, step) with random access, so that a resume needs only the step, and any
number of ranks or workers sees the same data.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from stdit.data.assignment import Assignment
from stdit.data.buckets import Bucket
from stdit.data.manifest.clips import Clip

# Keys of independent random streams under one seed; the streams of buckets have their numbers as keys.
ORDER_STREAM = 0x6F726472
WINDOW_STREAM = 0x77696E64
CROP_STREAM = 0x63726F70
DRAW_STREAM = 0x64726177


class PlannedItem(NamedTuple):
    """One sample: a clip, and where its frames begin."""

    clip: Clip
    start: float
    """Seconds after the first frame of the file."""


@dataclass(frozen=True)
class PlannedBatch:
    """The global batch of a step: `bucket.batch_size` clips of one bucket."""

    step: int
    epoch: int
    bucket: Bucket
    bucket_index: int
    indices: list[int]
    """Indices of its clips in `Assignment.clips`."""


@dataclass
class BatchPlan:
    """Batches by step. An epoch is a random order of the batches of all buckets, with each bucket's clips shuffled.

    A clip of weight 2 is drawn twice per epoch, one of weight 0.5 in every other epoch on average. A bucket has the
    same number of draws in every epoch, so the batch of a step is found without those before it.

    The last batch of a bucket in an epoch is filled up from the start of its order, so batches are always full. A
    bucket with fewer clips than a batch repeats clips within it (see `notes`), each with its own window.
    """

    assignment: Assignment
    seed: int = 0
    _cache: dict[int, tuple[int, np.ndarray]] = field(default_factory=dict, repr=False)
    _drawn_cache: dict[int, tuple[int, np.ndarray]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        assert self.assignment.kept > 0, "assign_clips() leaves at least one clip"
        count = range(len(self.assignment.buckets))
        self._draws = [self.assignment.draws_per_epoch(k) for k in count]
        self._ends = np.cumsum([self.assignment.steps_per_epoch(k) for k in count])

    def sized(self, tokens: Callable[[Bucket], int]) -> "BatchPlan":
        """Return the plan for `tokens(bucket)` tokens per clip: see `Bucket.sized`."""
        buckets = [bucket.sized(tokens(bucket)) for bucket in self.assignment.buckets]
        return BatchPlan(replace(self.assignment, buckets=buckets), self.seed)

    @property
    def steps_per_epoch(self) -> int:
        return int(self._ends[-1])

    @property
    def notes(self) -> list[str]:
        """Warnings about buckets with fewer clips than a batch, or clips larger than max_tokens."""
        notes = []
        for bucket, draws in zip(self.assignment.buckets, self._draws, strict=True):
            if 0 < draws < bucket.batch_size:
                notes.append(
                    f"bucket {bucket}: {draws} clips for batches of {bucket.batch_size}, so every batch repeats clips"
                )
            if draws and bucket.max_tokens and bucket.tokens and bucket.tokens > bucket.max_tokens:
                notes.append(
                    f"bucket {bucket}: one clip has {bucket.tokens:,} tokens, more than max_tokens = "
                    f"{bucket.max_tokens:,}"
                )
        return notes

    def report(self) -> str:
        """Return the table of buckets with the notes, for people."""
        return "\n".join([self.assignment.table(), *self.notes])

    def batch(self, step: int) -> PlannedBatch:
        """Return the global batch of a step, counted from 0."""
        epoch, k, first = self._locate(step)
        bucket = self.assignment.buckets[k]
        indices = [self._clip_index(epoch, k, first + i) for i in range(bucket.batch_size)]
        return PlannedBatch(step, epoch, bucket, k, indices)

    def replacements(self, step: int, index: int) -> Iterator[int]:
        """Yield the clips (indices in `Assignment.clips`) that may replace item `index` of a batch, best first.

        These are the other clips of the bucket, in the epoch's order from the failed one on, and then the clips that
        are not drawn in this epoch because of their weights.
        """
        epoch, k, first = self._locate(step)
        for i in range(1, self._draws[k]):
            yield self._clip_index(epoch, k, first + index + i)
        if self.assignment.weights(k) is not None:
            yield from self.assignment.members[k].tolist()

    def item(self, planned: PlannedBatch, index: int, clip_index: int) -> PlannedItem:
        """Return a clip (the planned one or a replacement) with its window, as item `index` of a batch."""
        clip = self.assignment.clips[clip_index]
        start = _draw_window_start(clip, planned.bucket, self.seed, planned.step, index)
        return PlannedItem(clip, clip.start + start)

    def crop_seed(self, step: int, index: int) -> int:
        """Return the seed of the random crop of item `index` of a step's batch."""
        return int(
            np.random.SeedSequence([self.seed, CROP_STREAM, step, index]).generate_state(1, np.uint64)[0] >> 1
        )

    def _locate(self, step: int) -> tuple[int, int, int]:
        """Return (epoch, bucket, place of the batch's first clip in the bucket's order)."""
        assert step >= 0, step
        epoch, within = divmod(step, self.steps_per_epoch)
        slot = int(self._permutation(self.steps_per_epoch, epoch, ORDER_STREAM)[within])
        k = int(np.searchsorted(self._ends, slot, side="right"))
        number = slot - (int(self._ends[k - 1]) if k else 0)
        return epoch, k, number * self.assignment.buckets[k].batch_size

    def _clip_index(self, epoch: int, k: int, place: int) -> int:
        chosen = self._permutation(self._draws[k], epoch, k)[place % self._draws[k]]
        return int(self._drawn(epoch, k)[chosen])

    def _drawn(self, epoch: int, k: int) -> np.ndarray:
        """Return the clips that a bucket draws in an epoch, with repetitions; only the latest epoch is cached."""
        members, weights = self.assignment.members[k], self.assignment.weights(k)
        if weights is None:
            return members
        if k not in self._drawn_cache or self._drawn_cache[k][0] != epoch:
            rng = np.random.default_rng(np.random.SeedSequence([self.seed, epoch, DRAW_STREAM, k]))
            mixed = self.assignment.is_regularisation(members)
            self._drawn_cache[k] = (epoch, members[_systematic_sample(weights, self._draws[k], rng, mixed)])
        return self._drawn_cache[k][1]

    def _permutation(self, length: int, epoch: int, stream: int) -> np.ndarray:
        """Return the permutation of an epoch; only the latest epoch of each stream is cached."""
        if stream not in self._cache or self._cache[stream][0] != epoch:
            rng = np.random.default_rng(np.random.SeedSequence([self.seed, epoch, stream]))
            self._cache[stream] = (epoch, rng.permutation(length))
        return self._cache[stream][1]


def _systematic_sample(
    weights: np.ndarray, count: int, rng: np.random.Generator, kind: np.ndarray
) -> np.ndarray:
    """Draw `count` indices in proportion to weights: each index its expected number of times, rounded down or up.

    Systematic sampling: shares are laid end to end in random order, and sampled at equal distances.

    Args:
        kind: of each index, bool: both kinds together are drawn as often as expected, too, rounded down or up.
    """
    order = rng.permutation(len(weights))
    order = order[np.argsort(kind[order], kind="stable")]
    ends = np.cumsum(weights[order])
    points = (np.arange(count) + rng.random()) * (ends[-1] / count)
    return order[np.minimum(np.searchsorted(ends, points, side="right"), len(order) - 1)]


def slack_seconds(clip: Clip, bucket: Bucket) -> float:
    """Return how many seconds longer than the bucket the clip is; 0 if it fits to within half a frame."""
    slack = clip.seconds - bucket.seconds
    return slack if slack >= 0.5 / bucket.fps and clip.num_frames > 1 else 0.0


def _draw_window_start(clip: Clip, bucket: Bucket, seed: int, step: int, index: int) -> float:
    """Draw where the window of item `index` of a step's batch begins in its clip, in seconds."""
    slack = slack_seconds(clip, bucket)
    if slack == 0:
        return 0.0
    return slack * float(
        np.random.default_rng(np.random.SeedSequence([seed, WINDOW_STREAM, step, index])).random()
    )
