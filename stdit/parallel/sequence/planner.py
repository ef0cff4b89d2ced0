"""Traffic, balance and memory of a batch whose videos are shared among ranks, and the choice of sp.

Pure functions; they need no process group.

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
    """Format bytes in GiB, with three digits, or as a whole number from 100 GiB."""
    return f"{size / GIB:,.0f}" if size >= 100 * GIB else f"{size / GIB:.3g}"


Saved = Literal["keep", "recompute", "offload", "nothing"]
"""For the backward pass: all activations, the input alone, all but in other memory, or nothing (sampling)."""


@dataclass(frozen=True)
class Workload:
    """A batch of videos, and what the model does with each."""

    clips: int
    """B, of the global batch."""
    frames: int
    """T."""
    patches: int
    """S."""
    width: int
    """D."""
    shard_axes: tuple[ShardAxis, ...]
    """Sharded axis of each block, in the order in which blocks run."""
    out_features: int
    """Values per token that the last layer returns."""
    element_size: int = FLOAT32_BYTES
    """Bytes of one value."""
    micro_batch_size: int | None = None
    """Clips of a rank in one pass, at most; None: its whole share of the batch."""
    saved: tuple[Saved, ...] | Saved = "keep"
    """What each block, or all, save for the backward pass."""

    @cached_property
    def blocks(self) -> Counter[ShardAxis]:
        """Number of blocks by sharded axis."""
        return Counter(self.shard_axes)

    @cached_property
    def switches(self) -> Counter[tuple[ShardAxis, int]]:
        """Number of switches in a forward pass, by target axis and values per token; the last carries the output."""
        stages: tuple[ShardAxis, ...] = ("time", *self.shard_axes, "time")
        widths = [self.width] * len(self.shard_axes) + [self.out_features]
        return Counter(
            (target, width)
            for (source, target), width in zip(pairwise(stages), widths, strict=True)
            if source != target
        )


@dataclass(frozen=True)
class ParallelDims:
    """Sizes of the process grid: ``processes = dp x sp``."""

    processes: int
    """Number of processes."""
    sp: int
    """Ranks that share each video."""
    chunks: int = 1
    """Chunks in which a block's output is sent (``parallel.overlap_chunks``)."""

    @property
    def dp(self) -> int:
        """Data-parallel ranks."""
        return self.processes // self.sp

    def clips(self, load: Workload) -> list[int]:
        """Return the clips of each data-parallel rank."""
        return even_sizes(load.clips, self.dp)

    def frames(self, load: Workload) -> list[int]:
        """Return the frames of each rank of a video while time is sharded."""
        return even_sizes(load.frames, self.sp)

    def patches(self, load: Workload) -> list[int]:
        """Return the patches of each rank of a video while space is sharded."""
        return even_sizes(load.patches, self.sp)


def divisors(number: int) -> list[int]:
    """Return the divisors of a number in ascending order: every sp that the number of processes allows."""
    return [n for n in range(1, number + 1) if number % n == 0]


def balance(load: Workload, dims: ParallelDims) -> float:
    """Return the mean tokens of a rank over those of the busiest rank, for which the others wait; 1.0 is even.

    Spatial blocks take as long as the largest share of frames, temporal blocks as the largest share of patches.
    """
    busiest = max(dims.frames(load)) * load.patches + load.frames * max(dims.patches(load))
    tokens = 2 * load.clips * load.frames * load.patches
    return tokens / (dims.processes * max(dims.clips(load)) * busiest)


class TrafficEstimate(NamedTuple):
    """What one rank sends to the ranks that share its videos, in one step."""

    forward: int
    """Bytes."""
    backward: int
    """Bytes."""
    calls: int
    """All-to-alls, forward and backward."""


def estimate_traffic(load: Workload, dims: ParallelDims, rank: int) -> TrafficEstimate:
    """Return exactly what one rank of ``dims.processes`` sends in a step (arXiv:2403.10266, section 3).

    In a switch to space it sends, of its T_n frames, the patches of the other ranks; in a switch to time, of its S_n
    patches, their frames. Backward returns what forward received.
    """
    dp_rank, sp_rank = divmod(rank, dims.sp)
    T, S = dims.frames(load), dims.patches(load)
    tokens = {
        "space": T[sp_rank] * (load.patches - S[sp_rank]),
        "time": S[sp_rank] * (load.frames - T[sp_rank]),
    }
    sharded = {"space": max(T), "time": max(S)}  # length of the axis that is sharded before the switch
    other: dict[ShardAxis, ShardAxis] = {"space": "time", "time": "space"}
    forward = backward = chunks = 0
    for (target, width), count in load.switches.items():
        forward += count * width * tokens[target]
        backward += count * width * tokens[other[target]]
        chunks += count * min(dims.chunks, sharded[target])
    batch_sizes = dims.clips(load)
    own = micro_batches(batch_sizes, dp_rank, load.micro_batch_size)
    clips = [len(range(batch_sizes[dp_rank])[samples]) for samples, _ in own]
    size = sum(clips) * load.element_size
    return TrafficEstimate(size * forward, size * backward, 2 * len(clips) * chunks if dims.sp > 1 else 0)


def activation_bytes(load: Workload, dims: ParallelDims) -> int:
    """Estimate the peak bytes of activations on a rank: the first, which has the largest share of everything.

    Blocks that save nothing of their own, or only their inputs, need room for one at a time. The constants were
    counted (`tests/parallel/sequence/test_planner.py`) in blocks with cross-attention and an MLP
    four times as wide. For each token and unit of width, a block saves 112 bytes in float32, and 68 under autocast to
    bfloat16, which leaves the norms in float32. SDPA saves no attention matrix, except on a CPU for rows of few
    tokens, where it is small. While a block is recomputed, gradients add half of that. Without a backward pass, a
    block holds 12 values.
    """
    clips = max(dims.clips(load))
    tokens: dict[ShardAxis, int] = {
        "time": max(dims.frames(load)) * load.patches,
        "space": load.frames * max(dims.patches(load)),
    }
    modes = (load.saved,) * len(load.shard_axes) if isinstance(load.saved, str) else load.saved
    block = 22 * load.element_size + 6 * FLOAT32_BYTES
    for_each = {"keep": block, "recompute": load.element_size, "offload": 0, "nothing": 0}
    at_once = {"keep": 0, "recompute": 3 * block // 2, "offload": block, "nothing": 12 * load.element_size}
    saved = sum(for_each[mode] * tokens[axis] for mode, axis in zip(modes, load.shard_axes, strict=True))
    per_width = saved + max(at_once[mode] for mode in modes) * max(tokens.values())
    return min(load.micro_batch_size or clips, clips) * load.width * per_width


class SpChoice(NamedTuple):
    """The sp that was chosen, and why."""

    sp: int
    reason: str
    fits: bool
    """Whether the estimate fits in the memory of a process."""

    def __str__(self) -> str:
        return f"{self.sp}, {self.reason}"


def choose_sp(needs: Mapping[int, int], available: int) -> SpChoice:
    """Return the smallest sp that fits in memory; if none fits, the one that needs least.

    Args:
        needs: bytes that a process needs, by sp.
        available: bytes that a process may use.
    """
    fitting = [sp for sp in sorted(needs) if needs[sp] <= available]
    sp = fitting[0] if fitting else min(needs, key=lambda sp: (needs[sp], sp))
    tried = ", ".join(map(str, sorted(needs)))
    reason = (
        f"the smallest of {tried} that fits" if fitting else f"which needs least, and none of {tried} fits"
    )
    return SpChoice(
        sp,
        f"{reason}: about {format_gib(needs[sp])} of {format_gib(available)} GiB per process",
        bool(fitting),
    )


def idle_warning(what: str, frames: int, dims: ParallelDims) -> list[str]:
    """Return a warning if ``what`` has fewer frames of tokens than ranks share it, so that some ranks idle."""
    if frames >= dims.sp:
        return []
    fitting = max(n for n in divisors(dims.processes) if n <= frames)
    idle = f"ranks {frames} to {dims.sp - 1}" if frames < dims.sp - 1 else f"rank {frames}"
    return [
        f"warning: parallel.sp = {dims.sp}, but {what} has {frames} {'frame' if frames == 1 else 'frames'} of "
        f"tokens: in spatial blocks, {idle} of each {dims.sp} will idle. The result is correct; "
        f"--parallel.sp {fitting} or longer videos waste less"
    ]
