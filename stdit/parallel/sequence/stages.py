"""The layout of each block on a grid of ranks, and the choice of the grid: those with which a model takes least time.

The unit of time is that in which a rank sends the D values of one token; of a batch of clips, those of the token in
all of them. Imports no torch.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from stdit.parallel.sequence.layouts import Grid, Layout, Tokens, with_halo

LAYOUTS: tuple[Layout, ...] = ("time", "space", "grid")


class Stage(NamedTuple):
    """Where a block runs."""

    kind: str
    """Its letter; see `stdit.models.config.BLOCK_KINDS`."""
    layout: Layout
    reaches_others: bool
    """Whether tokens that it sees are on other ranks."""


class Plan(NamedTuple):
    """How the blocks of a model run on a grid."""

    stages: tuple[Stage, ...]
    time: float


class Speeds(NamedTuple):
    """What a rank does in the time in which it sends one value; by default an NVLink GPU in bfloat16."""

    flops: float = 2_000.0
    """Floating-point operations: 400 TFLOP/s, and 400 GB/s."""
    call: float = 4e6
    """Values that it could send in the time that an exchange takes besides its values: 20 microseconds."""
    value_bytes: int = 2
    """Bytes of a value."""


class Costs(NamedTuple):
    """What the blocks of a model cost, in the time in which a rank sends a token."""

    heads: int
    head_size: int
    token: float
    """Computing a block for a token, without attention."""
    key: float
    """Attention of a token to one key."""
    call: float
    """An exchange, besides what it sends."""
    state: float
    """Sending a state of linear attention: ``d (d + 1)`` float32 values a head."""
    halo: int
    """Patches before and after those of a rank that its convolutions see (``model.mlp_conv``)."""
    causal: bool
    """Whether linear blocks see no later frames."""

    @classmethod
    def of(
        cls, width: int, heads: int, speeds: Speeds, clips: int = 1, halo: int = 0, causal: bool = False
    ) -> "Costs":
        """Return the costs of a model of some width on batches of ``clips``.

        A block takes 24 D^2 floating-point operations for a token, and 4 D for each key that it attends to; with the
        backward pass three times that, while each exchange happens twice.
        """
        state = (width // heads + 1) * 4 / speeds.value_bytes
        call = speeds.call / (clips * width)
        return cls(
            heads, width // heads, 36 * width / speeds.flops, 6 / speeds.flops, call, state, halo, causal
        )


@lru_cache(maxsize=1024)
def plan_stages(grid: Grid, frames: int, patches: int, kinds: str, costs: Costs) -> Plan:
    """Choose the layout of each block so that the whole model takes least time.

    A block takes as long as the rank with most tokens, which also sends what the attention of others needs; a switch
    as long as the rank that sends most.

    Args:
        kinds: letters of the blocks, in running order.
    """
    switch = {
        (one, two): _switch_time(grid, frames, patches, one, two, costs.call)
        for one in LAYOUTS
        for two in LAYOUTS
    }
    ways = {
        kind: [(stage, _block_time(grid, frames, patches, stage, costs)) for stage in _ways(grid, kind)]
        for kind in set(kinds)
    }
    times: dict[Layout, float] = {}
    came_from: list[dict[Layout, tuple[Layout, Stage]]] = []
    for kind in kinds:
        reached: dict[Layout, float] = {}
        here: dict[Layout, tuple[Layout, Stage]] = {}
        for stage, own in ways[kind]:
            sources = times if came_from else {first_layout(stage): 0.0}
            arrival = {source: time + switch[source, stage.layout] for source, time in sources.items()}
            before = min(arrival, key=arrival.__getitem__)
            reached[stage.layout] = arrival[before] + own
            here[stage.layout] = before, stage
        times = reached
        came_from.append(here)
    layout = min(times, key=times.__getitem__)
    plan, time = [], times[layout]
    for step in reversed(came_from):
        layout, stage = step[layout]
        plan.append(stage)
    return Plan(tuple(reversed(plan)), time)


def switched_for_attention(stages: Sequence[Stage]) -> list[Stage]:
    """Return stages in which only the attention of a lone temporal block is switched, there and back.

    That sends as much as switching the whole block, and nothing in a step that uses its attention again. Of temporal
    blocks that follow each other, each would be switched by itself, so these stay as they are.
    """
    switched = list(stages)
    for place, stage in enumerate(stages):
        beside = [stages[other] for other in (place - 1, place + 1) if 0 <= other < len(stages)]
        if stage.kind == "T" and beside and all(other.layout != "space" for other in beside):
            switched[place] = Stage("T", beside[0].layout, True)
    return switched


def first_layout(stage: Stage) -> Layout:
    """Return the layout in which a rank embeds its tokens, before the first block: a part of its row's frames."""
    return "time" if stage.layout == "time" else "grid"


def output_chunks(
    stage: Stage, sources: Sequence[Tokens], targets: Sequence[Tokens], tokens: int, chunks: int
) -> int:
    """Return in how many chunks the output of a block is computed and sent (``parallel.overlap_chunks``).

    One, if a rank has no axis along which the block's rows are independent, or if nothing is sent, or some tokens to
    several ranks.

    Args:
        tokens: of the video.
        chunks: at most.
    """
    if chunks == 1 or stage.layout == "grid" or stage.reaches_others or list(sources) == list(targets):
        return 1
    if sum(target.size for target in targets) > tokens:
        return 1
    return min(
        chunks, max((each.frames if stage.layout == "time" else each.patches).size for each in sources)
    )


def grids(ranks: int) -> list[Grid]:
    """Return all grids of a number of ranks, those with most rows first."""
    return [Grid(time, ranks // time) for time in range(ranks, 0, -1) if ranks % time == 0]


def choose_grid(ranks: int, frames: int, patches: int, kinds: str, costs: Costs) -> Grid:
    """Return the grid with the fastest `plan_stages`; of equally fast ones that with most rows."""
    if ranks == 1:  # torch.compile may not know the sizes
        return Grid(1, 1)
    return min(grids(ranks), key=lambda grid: plan_stages(grid, frames, patches, kinds, costs).time)


def _ways(grid: Grid, kind: str) -> Iterator[Stage]:
    if kind == "S":
        yield Stage(kind, "time", False)
        if grid.space > 1:
            yield Stage(kind, "grid", True)
    elif kind == "T":
        yield Stage(kind, "space", False)
    else:
        yield from (Stage(kind, layout, grid.size > 1) for layout in LAYOUTS)


@lru_cache(maxsize=256)
def _tokens(grid: Grid, layout: Layout, frames: int, patches: int) -> tuple[Tokens, ...]:
    return tuple(grid.tokens(layout, frames, patches))


def _switch_time(grid: Grid, frames: int, patches: int, source: Layout, target: Layout, call: float) -> float:
    before, after = (_tokens(grid, layout, frames, patches) for layout in (source, target))
    sent = max(own.size - own.common(then).size for own, then in zip(before, after, strict=True))
    return sent + call if sent else 0.0


def _block_time(grid: Grid, frames: int, patches: int, stage: Stage, costs: Costs) -> float:
    tokens = _tokens(grid, stage.layout, frames, patches)
    busiest = max(each.size for each in tokens)
    keys = {"S": patches, "T": frames, "J": frames * patches, "L": costs.head_size + 1}[stage.kind]
    time = busiest * (costs.token + keys * costs.key)
    if not stage.reaches_others:
        return time
    if costs.halo:
        wide = with_halo(tokens, 0 if stage.kind == "S" else 1, costs.halo, frames, patches)
        time += max(more.size - own.size for more, own in zip(wide, tokens, strict=True)) + costs.call
    if stage.kind == "L":
        return time + _states_sent(grid, stage.layout, frames, costs.causal) * costs.state + costs.call
    return time + _attention_time(busiest, grid.space if stage.kind == "S" else grid.size, costs)


def _states_sent(grid: Grid, layout: Layout, frames: int, causal: bool) -> int:
    """Return how many states the busiest rank sends: one to each other, or those of its frames within these."""
    if not causal or layout == "time":
        return grid.size - 1
    if layout == "space":
        return frames * (grid.size - 1)
    return -(-frames // grid.time) * (grid.space - 1) + grid.time - 1


def _attention_time(busiest: int, ranks: int, costs: Costs) -> float:
    """Return the time of the exchanges of attention over ranks: Ulysses in parts of them, and a ring of these.

    Backward a ring also sends the gradients of keys and values, in float32.
    """
    parts = ulysses_size(ranks, costs.heads)
    turns = ranks // parts - 1
    ulysses = 4 * busiest * (parts - 1) / parts + 2 * costs.call if parts > 1 else 0.0
    gradients = costs.state / (costs.head_size + 1)  # a float32 value in values
    return ulysses + turns * ((2 + gradients) * busiest + 1.5 * costs.call)


def ulysses_size(ranks: int, heads: int) -> int:
    """Return how many ranks exchange tokens for heads: as many as divide the ranks, each with at least one head."""
    return max(size for size in range(1, min(ranks, heads) + 1) if ranks % size == 0)
