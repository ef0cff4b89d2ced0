"""What a rank sends to the others that share its videos: an exact count, from the formulas of each method.

Pure functions; they need no process group.

Letters: B clips, T frames of tokens, S tokens of a frame, D width, N ranks that share a video; h heads of d channels.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from stdit.parallel.sequence.layouts import Grid, Layout, Span, Tokens, even_sizes, with_halo
from stdit.parallel.sequence.planner import FLOAT32_BYTES, ParallelDims, Workload
from stdit.parallel.sequence.sharding import micro_batches
from stdit.parallel.sequence.stages import Stage, first_layout, output_chunks, ulysses_size


class Sent(NamedTuple):
    """What one rank sends."""

    forward: int
    """Bytes."""
    backward: int
    """Bytes."""
    forward_calls: int
    """Exchanges."""
    backward_calls: int
    """Exchanges."""

    @property
    def calls(self) -> int:
        """Exchanges, forward and backward."""
        return self.forward_calls + self.backward_calls

    def __add__(self, other: "Sent") -> "Sent":  # type: ignore[override]
        return Sent(*(one + two for one, two in zip(self, other, strict=True)))

    def times(self, factor: int) -> "Sent":
        """Return what the clips of a micro-batch send, in the exchanges of one."""
        return self._replace(forward=self.forward * factor, backward=self.backward * factor)

    def often(self, count: int) -> "Sent":
        """Return what several equal blocks send."""
        return Sent(*(count * one for one in self))

    def repeated(self) -> "Sent":
        """Return what a block sends whose forward pass is recomputed in backward."""
        return self._replace(
            backward=self.backward + self.forward, backward_calls=self.backward_calls + self.forward_calls
        )


NOTHING = Sent(0, 0, 0, 0)


def estimate_traffic(load: Workload, dims: ParallelDims, rank: int) -> Sent:
    """Return exactly what one rank of ``dims.processes`` sends in a step."""
    dp_rank, sp_rank = divmod(rank, dims.sp)
    batch_sizes = dims.clips(load)
    micro = micro_batches(batch_sizes, dp_rank, load.micro_batch_size)
    if dims.sp == 1:
        return NOTHING
    clips = Counter(len(range(batch_sizes[dp_rank])[samples]) for samples, _ in micro)
    alone = replace(dims, processes=dims.sp)  # the size of a micro-batch counts for its grid
    loads = {count: replace(load, clips=count, micro_batch_size=None) for count in clips}
    sent = {count: sent_for_a_clip(each, alone, sp_rank) for count, each in loads.items()}
    return sum((sent[count].times(count).often(number) for count, number in clips.items()), NOTHING)


Reused = Mapping[str, Collection[str]]
"""By the letter of a block, parts of it of which the output of an earlier step is used (`stdit.models.broadcast`)."""


def sent_for_a_clip(load: Workload, dims: ParallelDims, rank: int, reused: Reused | None = None) -> Sent:
    """Return what one rank of those that share a clip sends for it, in a forward and a backward pass."""
    return sum((exchange.sent for exchange in exchanges_of_a_clip(load, dims, rank, reused)), NOTHING)


class Exchange(NamedTuple):
    """What one rank sends in some equal exchanges with the same ranks."""

    ranks: tuple[int, ...]
    """Those that take part."""
    sent: Sent


def exchanges_of_a_clip(
    load: Workload, dims: ParallelDims, rank: int, reused: Reused | None = None
) -> Iterator[Exchange]:
    """Yield what one rank of those that share a clip sends for it, in a forward and a backward pass."""
    grid, stages, size = dims.grid_of(load), dims.stages(load), load.element_size
    first = first_layout(stages[0])
    source, target = dims.tokens(load, first), dims.tokens(load, stages[0].layout)
    token = load.width * size
    yield Exchange(_ranks(grid, rank, first, stages[0].layout), redistribution(source, target, rank, token))
    modes = (load.saved,) * len(stages) if isinstance(load.saved, str) else load.saved
    for (stage, mode), count in Counter(zip(stages, modes, strict=True)).items():
        again = (reused or {}).get(stage.kind, ())
        for ranks, sent in exchanges_in_block(load, grid, stage, rank, again):
            yield Exchange(ranks, (sent.repeated() if mode == "recompute" else sent).often(count))
    for (stage, layout), count in Counter((one, two.layout) for one, two in pairwise(stages)).items():
        sent = _sent_after(load, dims, stage, dims.tokens(load, layout), rank, token).often(count)
        yield Exchange(_ranks(grid, rank, stage.layout, layout), sent)
    rows = [Tokens(frames, Span(0, load.patches)) for frames in grid.rows(load.frames)]
    last = stages[-1]._replace(reaches_others=False)  # the last layer asks for nothing
    ranks = tuple(range(grid.size)) if last.layout == "space" else grid.row(rank)
    yield Exchange(ranks, _sent_after(load, dims, last, rows, rank, load.out_features * size))


def _ranks(grid: Grid, rank: int, source: Layout, target: Layout) -> tuple[int, ...]:
    """Return the ranks among which tokens move from one layout to another."""
    if {source, target} == {"grid", "space"}:
        return grid.column(rank)
    return grid.row(rank) if {source, target} == {"grid", "time"} else tuple(range(grid.size))


def _sent_after(
    load: Workload, dims: ParallelDims, stage: Stage, target: Sequence[Tokens], rank: int, token: int
) -> Sent:
    """Return what a rank sends of the output of a stage, in as many parts as `TokenSharding.run_then_switch`."""
    source = dims.tokens(load, stage.layout)
    sent = redistribution(source, target, rank, token)
    chunks = output_chunks(stage, source, target, load.frames * load.patches, dims.chunks)
    return sent._replace(
        forward_calls=chunks * sent.forward_calls, backward_calls=chunks * sent.backward_calls
    )


def exchanges_in_block(
    load: Workload, grid: Grid, stage: Stage, rank: int, reused: Collection[str] = ()
) -> Iterator[Exchange]:
    """Yield what a rank sends for attention and convolution of a block, for a clip.

    Args:
        reused: parts of the block that are not computed.
    """
    if not stage.reaches_others:
        return
    if "attention" not in reused:
        yield from _exchanges_for_tokens(load, grid, stage, rank)
    if load.convolves and "mlp" not in reused:
        tokens = grid.tokens(stage.layout, load.frames, load.patches)
        frames = 0 if stage.kind == "S" else 1
        wide = with_halo(tokens, frames, load.columns + 1, load.frames, load.patches)
        ranks = grid.row(rank) if stage.kind == "S" else tuple(range(grid.size))
        yield Exchange(ranks, redistribution(tokens, wide, rank, load.width * load.element_size))


def _exchanges_for_tokens(load: Workload, grid: Grid, stage: Stage, rank: int) -> Iterator[Exchange]:
    """Yield what a rank sends for the self-attention of a block, for a clip."""
    tokens, size = grid.tokens(stage.layout, load.frames, load.patches), load.element_size
    heads = load.width // load.head_size
    of_stage = grid.row(rank) if stage.kind == "S" else tuple(range(grid.size))
    if stage.kind == "S":
        lengths = [tokens[other].patches.size for other in of_stage]
        for ranks, sent in exchanges_for_attention(lengths, of_stage, rank, heads, load.head_size, size):
            yield Exchange(ranks, sent.times(tokens[rank].frames.size))
    elif stage.kind == "J":
        lengths = [each.size for each in tokens]
        yield from exchanges_for_attention(lengths, of_stage, rank, heads, load.head_size, size)
    elif stage.kind == "T":  # its attention alone is switched, there and back
        frames = grid.tokens("space", load.frames, load.patches)
        ranks = _ranks(grid, rank, stage.layout, "space")
        for source, target in ((tokens, frames), (frames, tokens)):
            yield Exchange(ranks, redistribution(source, target, rank, load.width * size))
    else:
        yield from exchanges_for_states(load, grid, stage, rank)


def redistribution(source: Sequence[Tokens], target: Sequence[Tokens], rank: int, token: int) -> Sent:
    """Return what a rank sends to give each its target: tokens that it has and others get; backward, the reverse.

    Args:
        token: bytes of one.
    """
    if source == target:
        return NOTHING
    others = [other for other in range(len(source)) if other != rank]
    sent = sum(source[rank].common(target[other]).size for other in others)
    received = sum(source[other].common(target[rank]).size for other in others)
    return Sent(sent * token, received * token, 1, 1)


def exchanges_for_attention(
    lengths: Sequence[int], ranks: tuple[int, ...], rank: int, heads: int, head_size: int, size: int
) -> Iterator[Exchange]:
    """Yield what a rank sends for attention over a row of tokens: see `stdit.parallel.sequence.usp`.

    Ulysses: of q, k and v its tokens for the heads of others; of the output their tokens for its heads. Ring: keys
    and values of P/U - 1 parts, backward also their gradients, in float32.

    Args:
        lengths: tokens of each of ``ranks``.
        size: bytes of a value.
    """
    if (count := len(ranks)) == 1:
        return
    parts = ulysses_size(count, heads)
    part, place = divmod(ranks.index(rank), parts)
    own = even_sizes(heads, parts)[place]
    of_parts = [sum(lengths[begin : begin + parts]) for begin in range(0, count, parts)]
    if parts > 1:
        length = lengths[ranks.index(rank)]
        for_others = length * (heads - own) * head_size * size
        of_others = (of_parts[part] - length) * own * head_size * size
        sent = Sent(3 * for_others + of_others, for_others + 3 * of_others, 2, 2)
        yield Exchange(ranks[part * parts : (part + 1) * parts], sent)
    if (turns := len(of_parts)) > 1:
        passed = sum(of_parts[(part - step) % turns] for step in range(turns - 1))
        summed = sum(of_parts[(part - step) % turns] for step in range(1, turns))
        pair = 2 * own * head_size
        back = pair * (passed * size + summed * max(size, FLOAT32_BYTES))
        yield Exchange(ranks[place::parts], Sent(pair * passed * size, back, turns - 1, 2 * (turns - 1)))


def exchanges_for_states(load: Workload, grid: Grid, stage: Stage, rank: int) -> Iterator[Exchange]:
    """Yield what a rank sends for linear attention: states of d (d + 1) values a head, whatever the length.

    To all other ranks one state (LASP-2, arXiv:2502.07563). Causal: that of each frame to the ranks that have other
    patches of it, and one to all ranks with later frames.
    """
    state = load.width * (load.head_size + 1) * max(load.element_size, FLOAT32_BYTES)
    everyone = tuple(range(grid.size))
    if not load.causal:
        yield Exchange(everyone, Sent(state * (grid.size - 1), state * (grid.size - 1), 1, 1))
        return
    same, rows = {
        "grid": (grid.row(rank), grid.column(rank)),
        "time": ((rank,), everyone),
        "space": (everyone, (rank,)),
    }[stage.layout]
    if len(same) > 1:
        frames = grid.tokens(stage.layout, load.frames, load.patches)[rank].frames.size
        within = state * frames * (len(same) - 1)
        yield Exchange(same, Sent(within, within, 1, 1))
    if len(rows) > 1:
        earlier = rows.index(rank)
        yield Exchange(rows, Sent(state * (len(rows) - 1 - earlier), state * earlier, 1, 1))
