"""Balance and memory of a batch whose videos are shared among ranks, and the choice of sp; see also `traffic`.

Pure functions; they need no process group.

Letters: B clips, T frames of tokens, S tokens of a frame, D width, N ranks that share a video (sp).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from stdit.parallel.sequence.layouts import Grid, Layout, Tokens, even_sizes
from stdit.parallel.sequence.stages import (
    Costs,
    Speeds,
    Stage,
    choose_grid,
    grids,
    plan_stages,
    switched_for_attention,
    ulysses_size,
)

MIB, GIB = 2**20, 2**30
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
    kinds: str
    """Letters of the blocks, in the order in which they run; see `stdit.models.config.BLOCK_KINDS`."""
    head_size: int
    """Channels of an attention head."""
    columns: int
    """Patches in a row of a frame."""
    out_features: int
    """Values per token that the last layer returns."""
    element_size: int = FLOAT32_BYTES
    """Bytes of one value."""
    micro_batch_size: int | None = None
    """Clips of a rank in one pass, at most; None: its whole share of the batch."""
    saved: tuple[Saved, ...] | Saved = "keep"
    """What each block, or all, save for the backward pass."""
    convolves: bool = False
    """Whether MLPs see the neighbours of a token (``model.mlp_conv``)."""
    causal: bool = False
    """Whether linear blocks see no later frames."""


@dataclass(frozen=True)
class ParallelDims:
    """Sizes of the process grid: ``processes = dp x sp``."""

    processes: int
    """Number of processes."""
    sp: int
    """Ranks that share each video."""
    chunks: int = 1
    """Chunks in which a block's output is sent (``parallel.overlap_chunks``)."""
    grid: Grid | None = None
    """How those ranks divide time and space; None: as is fastest for a video."""
    speeds: Speeds = Speeds()
    """What a rank computes and sends, for that choice."""
    keeps_attention: bool = False
    """Whether later sampling steps use attention again: see `switched_for_attention`."""

    @property
    def dp(self) -> int:
        """Data-parallel ranks."""
        return self.processes // self.sp

    def clips(self, load: Workload) -> list[int]:
        """Return the clips of each data-parallel rank."""
        return even_sizes(load.clips, self.dp)

    def grid_of(self, load: Workload) -> Grid:
        """Return how the ranks of a video divide time and space."""
        return self.grid or choose_grid(self.sp, load.frames, load.patches, load.kinds, self._costs(load))

    def stages(self, load: Workload) -> Sequence[Stage]:
        """Return in which layout each block runs."""
        costs = self._costs(load)
        stages = plan_stages(self.grid_of(load), load.frames, load.patches, load.kinds, costs).stages
        return switched_for_attention(stages) if self.keeps_attention and not costs.halo else stages

    def _costs(self, load: Workload) -> Costs:
        most = max(self.clips(load))
        clips = max(1, min(load.micro_batch_size or most, most))
        heads, halo = load.width // load.head_size, load.columns + 1 if load.convolves else 0
        return Costs.of(load.width, heads, self.speeds, clips, halo, load.causal)

    def tokens(self, load: Workload, layout: Layout) -> list[Tokens]:
        """Return the tokens of each rank of a video in a layout."""
        return self.grid_of(load).tokens(layout, load.frames, load.patches)


def divisors(number: int) -> list[int]:
    """Return the divisors of a number in ascending order: every sp that the number of processes allows."""
    return [n for n in range(1, number + 1) if number % n == 0]


def balance(load: Workload, dims: ParallelDims, kinds: str = "") -> float:
    """Return the mean tokens of a rank over those of the busiest rank, for which the others wait; 1.0 is even.

    Args:
        kinds: letters of the blocks that count; empty: all.
    """
    counts = Counter(stage.layout for stage in dims.stages(load) if not kinds or stage.kind in kinds)
    busiest = sum(
        count * max(each.size for each in dims.tokens(load, layout)) for layout, count in counts.items()
    )
    tokens = counts.total() * load.clips * load.frames * load.patches
    return tokens / (dims.processes * max(dims.clips(load)) * busiest)


def activation_bytes(load: Workload, dims: ParallelDims) -> int:
    """Estimate the peak bytes of activations on the rank with most tokens.

    Blocks that save nothing of their own, or only their inputs, need room for one at a time. The constants were
    counted (`tests/parallel/sequence/test_planner.py`) in blocks with cross-attention and an MLP
    four times as wide. For each token and unit of width, a block saves 112 bytes in float32, and 68 under autocast to
    bfloat16, which leaves the norms in float32; linear attention 20 more, since it computes in float32. SDPA saves no
    attention matrix, except on a CPU for rows of few tokens, where it is small. While a block is recomputed,
    gradients add half of that. Without a backward pass, a block holds 12 values.
    """
    clips = max(dims.clips(load))
    stages = dims.stages(load)
    busiest = {
        layout: max(each.size for each in dims.tokens(load, layout))
        for layout in {stage.layout for stage in stages}
    }
    modes = (load.saved,) * len(load.kinds) if isinstance(load.saved, str) else load.saved
    saved = most = 0
    for stage, mode in zip(stages, modes, strict=True):
        block = 22 * load.element_size + (11 if stage.kind == "L" else 6) * FLOAT32_BYTES
        for_each = {"keep": block, "recompute": load.element_size, "offload": 0, "nothing": 0}
        at_once = {
            "keep": 0,
            "recompute": 3 * block // 2,
            "offload": block,
            "nothing": 12 * load.element_size,
        }
        saved += for_each[mode] * busiest[stage.layout]
        most = max(most, at_once[mode] * max(busiest.values()))
    return min(load.micro_batch_size or clips, clips) * load.width * (saved + most)


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


def describe_grid(load: Workload, dims: ParallelDims) -> str:
    """Describe how the ranks of a video divide it, and in which layout each kind of block runs."""
    grid = dims.grid_of(load)
    counts = Counter(dims.stages(load))
    blocks = [f"{count} {_describe_stage(stage, grid, load)}" for stage, count in counts.items()]
    return f"{grid}, balance {balance(load, dims):.2f}; blocks {', '.join(blocks)}"


def _describe_stage(stage: Stage, grid: Grid, load: Workload) -> str:
    where = f"{stage.kind} in {stage.layout}"
    if not stage.reaches_others or stage.kind == "L":
        return where
    heads, ranks = load.width // load.head_size, grid.space if stage.kind == "S" else grid.size
    if (parts := ulysses_size(ranks, heads)) == ranks:
        return where
    return f"{where} ({heads} heads for {ranks} ranks: Ulysses in {parts}, and a ring of {ranks // parts})"


def idle_warning(what: str, load: Workload, dims: ParallelDims) -> list[str]:
    """Return a warning if some ranks have none of the tokens of ``what`` in some blocks, and idle there."""
    layouts = {stage.layout for stage in dims.stages(load)}
    empty = [[each.size == 0 for each in dims.tokens(load, layout)] for layout in layouts]
    idle = [rank for rank in range(dims.sp) if any(of_layout[rank] for of_layout in empty)]
    if not idle:
        return []
    several = "ranks " + ", ".join(map(str, idle)) if len(idle) > 1 else f"rank {idle[0]}"
    best = max(grids(dims.sp), key=lambda grid: balance(load, replace(dims, grid=grid)))
    is_better = balance(load, replace(dims, grid=best)) > balance(load, dims)
    way_out = f"--parallel.grid '{best}'" if is_better else "fewer ranks"
    tokens = f"{_counted(load.frames, 'frame')} of {_counted(load.patches, 'token')}"
    return [
        f"warning: parallel.grid = {dims.grid_of(load)}, but {what} has {tokens}: in some "
        f"blocks, {several} of each {dims.sp} will idle. The result is correct; {way_out} or longer or larger videos "
        "waste less"
    ]


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
