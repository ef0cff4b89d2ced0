"""The batch plan: which clips make up the global batch of any step.

A pure function of (seed, manifest, buckets, step) with random access, so that a resume needs the step and
nothing else, and any number of ranks or workers sees the same data.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from stdit.data.assignment import Assignment
from stdit.data.buckets import Bucket
from stdit.data.manifest.clips import Clip

# Names of independent random streams under one seed; those of buckets are their numbers.
ORDER_STREAM = 0x6F726472
WINDOW_STREAM = 0x77696E64
CROP_STREAM = 0x63726F70
DRAW_STREAM = 0x64726177


class PlannedItem(NamedTuple):
    """One sample: which clip, and where in it its frames begin."""

    clip: Clip
    start: float
    """Seconds after the first frame of the file."""


@dataclass(frozen=True)
class PlannedBatch:
    """The global batch of one step: `bucket.batch_size` clips of one bucket."""

    step: int
    epoch: int
    bucket: Bucket
    bucket_index: int
    indices: list[int]
    """Places of its clips in `Assignment.clips`."""


@dataclass
class BatchPlan:
    """Batches by step. An epoch is a shuffle of the batches of all buckets, each bucket's clips shuffled
    anew.

    A clip of weight 2 is drawn twice an epoch; of weight 0.5 in every other epoch on average, by lot. The draws of a
    bucket are as many in every epoch, so that a step's place is known without those before it.

    The last batch of a bucket in an epoch is filled up from the start of its order, so that batches are
    always full; a bucket smaller than its batch repeats clips within one (`notes` says so), with windows of
    their own.
    """

    assignment: Assignment
    seed: int = 0
    _cache: dict[int, tuple[int, np.ndarray]] = field(default_factory=dict, repr=False)
    _drawn_cache: dict[int, tuple[int, np.ndarray]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        assert self.assignment.kept > 0, "assign() leaves at least one clip"
        count = range(len(self.assignment.buckets))
        self._draws = [self.assignment.draws_per_epoch(k) for k in count]
        self._ends = np.cumsum([self.assignment.steps_per_epoch(k) for k in count])

    def sized(self, tokens: Callable[[Bucket], int]) -> "BatchPlan":
        """The plan when a clip of each bucket has so many tokens: see `Bucket.sized`."""
        buckets = [bucket.sized(tokens(bucket)) for bucket in self.assignment.buckets]
        return BatchPlan(replace(self.assignment, buckets=buckets), self.seed)

    @property
    def steps_per_epoch(self) -> int:
        return int(self._ends[-1])

    @property
    def notes(self) -> list[str]:
        """What a user should know about buckets that are too small, or whose clips are too large, for their batch."""
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
        """The table of buckets with the notes, for people."""
        return "\n".join([self.assignment.table(), *self.notes])

    def batch(self, step: int) -> PlannedBatch:
        """The global batch of a step, counted from 0, without walking through the steps before it."""
        epoch, k, first = self._locate(step)
        bucket = self.assignment.buckets[k]
        indices = [self._clip_index(epoch, k, first + i) for i in range(bucket.batch_size)]
        return PlannedBatch(step, epoch, bucket, k, indices)

    def replacements(self, step: int, index: int) -> Iterator[int]:
        """Places in `Assignment.clips` of those that stand in, in turn, for item `index` of a batch that
        fails.

        They are the other clips of the bucket, in the epoch's order from the failed one on; then, where weights leave
        some out of the epoch, those too.
        """
        epoch, k, first = self._locate(step)
        for i in range(1, self._draws[k]):
            yield self._clip_index(epoch, k, first + index + i)
        if self.assignment.weights(k) is not None:
            yield from self.assignment.members[k].tolist()

    def item(self, planned: PlannedBatch, index: int, clip_index: int) -> PlannedItem:
        """A clip, the planned one or one that stands in for it, as item `index` of a batch."""
        clip = self.assignment.clips[clip_index]
        start = window_start_seconds(clip, planned.bucket, self.seed, planned.step, index)
        return PlannedItem(clip, clip.start + start)

    def crop_seed(self, step: int, index: int) -> int:
        """Seed of the random crop of item `index` of a step's batch."""
        return int(
            np.random.SeedSequence([self.seed, CROP_STREAM, step, index]).generate_state(1, np.uint64)[0] >> 1
        )

    def _locate(self, step: int) -> tuple[int, int, int]:
        """(epoch, bucket, place of the batch's first clip in the bucket's order)."""
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
        """The clips that a bucket draws in an epoch, each as often as it does; only the latest epoch is kept."""
        members, weights = self.assignment.members[k], self.assignment.weights(k)
        if weights is None:
            return members
        if k not in self._drawn_cache or self._drawn_cache[k][0] != epoch:
            rng = np.random.default_rng(np.random.SeedSequence([self.seed, epoch, DRAW_STREAM, k]))
            self._drawn_cache[k] = (epoch, members[draw(weights, self._draws[k], rng)])
        return self._drawn_cache[k][1]

    def _permutation(self, length: int, epoch: int, stream: int) -> np.ndarray:
        """Of one epoch; only the latest epoch of each stream is kept."""
        if stream not in self._cache or self._cache[stream][0] != epoch:
            rng = np.random.default_rng(np.random.SeedSequence([self.seed, epoch, stream]))
            self._cache[stream] = (epoch, rng.permutation(length))
        return self._cache[stream][1]


def draw(weights: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Places drawn in proportion to weights, `count` of them in all, each its share rounded down or up.

    Systematic sampling: shares are laid end to end in random order, and a comb with teeth one apart is laid on them.
    """
    order = rng.permutation(len(weights))
    ends = np.cumsum(weights[order])
    teeth = (np.arange(count) + rng.random()) * (ends[-1] / count)
    return order[np.minimum(np.searchsorted(ends, teeth, side="right"), len(order) - 1)]


def slack_seconds(clip: Clip, bucket: Bucket) -> float:
    """How much longer than the bucket's window the clip is; 0 when it fits to within half a frame."""
    slack = clip.seconds - bucket.seconds
    return slack if slack >= 0.5 / bucket.fps and clip.num_frames > 1 else 0.0


def window_start_seconds(clip: Clip, bucket: Bucket, seed: int, step: int, index: int) -> float:
    """Where the window of item `index` of a step's batch begins within its clip, drawn evenly; 0 when the
    clip fits exactly."""
    slack = slack_seconds(clip, bucket)
    if slack == 0:
        return 0.0
    return slack * float(
        np.random.default_rng(np.random.SeedSequence([seed, WINDOW_STREAM, step, index])).random()
    )
