"""What it takes to share videos among ranks, and among how many to share them. Pure functions: no process is needed.

Letters: B clips, T frames of tokens, S tokens of a frame, D width, N ranks that share a video (sp).
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal, NamedTuple

from stdit.parallel.sequence.sharding import ShardAxis, even_sizes, micro_batches

GIB = 2**30
FLOAT32_BYTES = 4


def format_gib(size: int) -> str:
    """Bytes in GiB, to three digits or to whole ones."""
    return f"{size / GIB:,.0f}" if size >= 100 * GIB else f"{size / GIB:.3g}"


@dataclass(frozen=True)
class Workload:
    """A batch of videos and the model that it passes through."""

    clips: int
    """B, of all ranks together."""
    frames: int
    """T."""
    patches: int
    """S."""
    width: int
    """D."""
    shard_axes: tuple[ShardAxis, ...]
    """Of the blocks, in the order in which they run."""
    out_features: int
    """Numbers that the last layer gives for a token."""
    element_size: int = FLOAT32_BYTES
    """Bytes of a number."""
    micro_batch_size: int | None = None
    """Most clips of a rank in one pass; None: its whole share."""
    saved: Literal["blocks", "inputs", "nothing"] = "blocks"
    """For the backward pass: what blocks computed, only what entered them (checkpointing), or nothing (sampling)."""

    @cached_property
    def blocks(self) -> Counter[ShardAxis]:
        """Number of blocks, by the axis that is sharded in them."""
        return Counter(self.shard_axes)

    @cached_property
    def switches(self) -> Counter[tuple[ShardAxis, int]]:
        """How often a pass switches to a sharded axis, with so many numbers each; the last carries the output."""
        stages: tuple[ShardAxis, ...] = ("time", *self.shard_axes, "time")
        widths = [self.width] * len(self.shard_axes) + [self.out_features]
        return Counter(
            (target, width)
            for (source, target), width in zip(pairwise(stages), widths, strict=True)
            if source != target
        )


@dataclass(frozen=True)
class ParallelDims:
    """Processes, of which each ``sp`` neighbours share their videos."""

    processes: int
    sp: int
    chunks: int = 1
    """Pieces in which the result of a block travels."""

    @property
    def dp(self) -> int:
        """Parts of the batch."""
        return self.processes // self.sp

    def clips(self, load: Workload) -> list[int]:
        """Clips of each part of the batch."""
        return even_sizes(load.clips, self.dp)

    def frames(self, load: Workload) -> list[int]:
        """Frames of each rank of a sequence, where time is sharded."""
        return even_sizes(load.frames, self.sp)

    def patches(self, load: Workload) -> list[int]:
        """Patches of each rank of a sequence, where space is sharded."""
        return even_sizes(load.patches, self.sp)


def divisors(number: int) -> list[int]:
    """Ascending: the numbers of ranks that may share a video, of so many."""
    return [n for n in range(1, number + 1) if number % n == 0]


def balance(load: Workload, split: ParallelDims) -> float:
    """Tokens of a rank, on average, over those of the busiest, for which the others wait; 1.0: all have as many.

    Spatial blocks take as long as the largest share of frames, temporal ones as the largest of patches.
    """
    busiest = max(split.frames(load)) * load.patches + load.frames * max(split.patches(load))
    tokens = 2 * load.clips * load.frames * load.patches
    return tokens / (split.processes * max(split.clips(load)) * busiest)


class TrafficEstimate(NamedTuple):
    """What a rank sends to those that share its videos, in one step."""

    forward: int
    """Bytes."""
    backward: int
    """Bytes."""
    calls: int
    """All-to-alls, forward and backward."""


def estimate_traffic(load: Workload, split: ParallelDims, rank: int) -> TrafficEstimate:
    """Exactly what one of ``split.processes`` ranks sends (arXiv:2403.10266, section 3).

    Of its T_n frames it sends the patches of the others, or of its S_n patches the frames of the others; backward
    returns what forward brought.
    """
    part, place = divmod(rank, split.sp)
    T, S = split.frames(load), split.patches(load)
    numbers = {"space": T[place] * (load.patches - S[place]), "time": S[place] * (load.frames - T[place])}
    sharded = {"space": max(T), "time": max(S)}  # where tokens on their way to an axis come from
    other: dict[ShardAxis, ShardAxis] = {"space": "time", "time": "space"}
    forward = backward = pieces = 0
    for (target, width), count in load.switches.items():
        forward += count * width * numbers[target]
        backward += count * width * numbers[other[target]]
        pieces += count * min(split.chunks, sharded[target])
    parts = split.clips(load)
    clips = [len(range(parts[part])[rows]) for rows, _ in micro_batches(parts, part, load.micro_batch_size)]
    size = sum(clips) * load.element_size
    return TrafficEstimate(size * forward, size * backward, 2 * len(clips) * pieces if split.sp > 1 else 0)


def activation_bytes(load: Workload, split: ParallelDims) -> int:
    """Estimate of the most that a rank holds of a pass: the first one, which has the largest share of everything.

    Counted in `tests/parallel/sequence/test_planner.py`, in blocks that attend to the caption, with an MLP four times
    as wide. For a token and a unit of width, a block keeps 112 bytes in float32 and 68 under autocast to bfloat16,
    which leaves the norms in float32; SDPA keeps no attention matrix, and those of few tokens, which a CPU keeps,
    count little. While a block is recomputed, gradients on their way take half as much again. Without a backward
    pass a block holds 12 numbers.
    """
    clips = max(split.clips(load))
    tokens: dict[ShardAxis, int] = {
        "time": max(split.frames(load)) * load.patches,
        "space": load.frames * max(split.patches(load)),
    }
    in_all_blocks = sum(count * tokens[shard] for shard, count in load.blocks.items())
    in_a_block = max(tokens.values())
    block = 22 * load.element_size + 6 * FLOAT32_BYTES
    kept = {
        "blocks": block * in_all_blocks,
        "inputs": load.element_size * in_all_blocks + 3 * block // 2 * in_a_block,
        "nothing": 12 * load.element_size * in_a_block,
    }[load.saved]
    return min(load.micro_batch_size or clips, clips) * load.width * kept


class SpChoice(NamedTuple):
    """How many of some processes share each video, and why so many."""

    sp: int
    reason: str
    fits: bool
    """Whether a process then has memory enough."""

    def __str__(self) -> str:
        return f"{self.sp}, {self.reason}"


def choose_sp(needs: Mapping[int, int], available: int) -> SpChoice:
    """The smallest number of ranks with which a process has memory enough; if none has, that which needs least.

    Args:
        needs: bytes of a process, by the number of ranks that share a video.
        available: bytes of a process.
    """
    fitting = [sp for sp in sorted(needs) if needs[sp] <= available]
    sp = fitting[0] if fitting else min(needs, key=lambda sp: (needs[sp], sp))
    tried = ", ".join(map(str, sorted(needs)))
    reason = (
        f"the smallest of {tried} that fits" if fitting else f"which takes least, and none of {tried} fits"
    )
    return SpChoice(
        sp, f"{reason}: about {format_gib(needs[sp])} of {format_gib(available)} GiB a process", bool(fitting)
    )


def idle_warning(what: str, frames: int, split: ParallelDims) -> list[str]:
    """A line that says which ranks have nothing to do, if ``what`` has fewer frames of tokens than ranks share it."""
    if frames >= split.sp:
        return []
    fitting = max(n for n in divisors(split.processes) if n <= frames)
    idle = f"ranks {frames} to {split.sp - 1}" if frames < split.sp - 1 else f"rank {frames}"
    return [
        f"warning: parallel.sp = {split.sp}, but {what} has {frames} {'frame' if frames == 1 else 'frames'} of "
        f"tokens: in spatial blocks, {idle} of each {split.sp} will idle. The result is right; "
        f"--parallel.sp {fitting} or longer videos waste less"
    ]
