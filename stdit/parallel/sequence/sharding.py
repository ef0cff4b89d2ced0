"""How a video's tokens are sharded over ranks from block to block (arXiv:2403.10266, section 3, on a grid of ranks).

Letters: B batch, T frames of tokens, S tokens of a frame, D width, N ranks; T_n and S_n are one rank's share.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

from torch import Tensor

from stdit.parallel.sequence.collectives import all_gather, redistribute, redistribute_pipelined, sum_over
from stdit.parallel.sequence.group import Group
from stdit.parallel.sequence.layouts import Grid, Layout, Span, Tokens, even_sizes, with_halo
from stdit.parallel.sequence.stages import Costs, Stage, output_chunks, plan_stages, switched_for_attention
from stdit.parallel.sequence.usp import Attend, attend_over


def micro_batches(batch_sizes: list[int], dp_rank: int, max_size: int | None) -> list[tuple[slice, bool]]:
    """Split a data-parallel rank's share of a batch into micro-batches: slices, and whether their loss counts.

    All ranks get the same number, since they wait for each other in every pass. A rank that has no samples left
    repeats its first sample in micro-batches that do not count.

    Args:
        batch_sizes: samples of each data-parallel rank, the largest first.
        max_size: samples of a micro-batch, at most; None: no limit.
    """
    size = max_size or batch_sizes[0]
    return [
        (slice(start, start + size), True) if start < batch_sizes[dp_rank] else (slice(1), False)
        for start in range(0, batch_sizes[0], size)
    ]


class TokenSharding:
    """How the tokens of a batch of videos are sharded over a group of ranks.

    Args:
        group: the ranks that share each video.
        frames: frames of tokens, T.
        patches: tokens of a frame, S.
        patch_frames: latent frames of one token.
        grid: how the ranks divide time and space; None: time alone.
        costs: of the model's blocks, from which their layouts are chosen; None: on one rank.
    """

    def __init__(
        self,
        group: Group,
        frames: int,
        patches: int,
        patch_frames: int = 1,
        grid: Grid | None = None,
        costs: Costs | None = None,
    ) -> None:
        self.group, self.frames, self.patches, self.patch_frames = group, frames, patches, patch_frames
        self.costs = costs
        self._tokens: dict[Layout, list[Tokens]] = {}
        self.grid = grid or Grid(group.size, 1)
        if self.grid.size != group.size:
            raise ValueError(f"the grid {self.grid} has {self.grid.size} ranks, and the group {group.size}")

    def tokens(self, layout: Layout) -> list[Tokens]:
        """Return the tokens of each rank."""
        if layout not in self._tokens:  # every block asks for them several times
            self._tokens[layout] = self.grid.tokens(layout, self.frames, self.patches)
        return self._tokens[layout]

    @property
    def row_tokens(self) -> list[Tokens]:
        """Whole frames of each rank's row: those of the latents that the model takes and returns."""
        return [Tokens(frames, Span(0, self.patches)) for frames in self.grid.rows(self.frames)]

    @cached_property
    def row_group(self) -> Group:
        """The ranks that have the same frames."""
        return self.group.part(self.grid.row(self.group.rank))

    @cached_property
    def column_group(self) -> Group:
        """The ranks that have the same patches."""
        return self.group.part(self.grid.column(self.group.rank))

    def stages(self, kinds: str, keeps_attention: bool = False) -> Sequence[Stage]:
        """Return in which layout each block runs; see `plan_stages`.

        Args:
            keeps_attention: attention is used again in later steps: see `switched_for_attention`.
        """
        if self.costs is None or self.group.size == 1:  # torch.compile may not know the sizes
            return [Stage(kind, "space" if kind == "T" else "time", False) for kind in kinds]
        stages = plan_stages(self.grid, self.frames, self.patches, kinds, self.costs).stages
        return switched_for_attention(stages) if keeps_attention and not self.costs.halo else stages

    def shard(self, stage: Stage) -> "TokenShard | None":
        """Return what a block has to ask of other ranks; None: nothing."""
        return TokenShard(self, stage) if stage.reaches_others else None

    def own(self, layout: Layout) -> Tokens:
        """Return this rank's tokens."""
        return self.tokens(layout)[self.group.rank]

    def run_then_switch(
        self,
        run: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        values: Tensor,
        stage: Stage,
        following: Stage,
    ) -> Tensor:
        """Run a part of the model, and switch its output to the layout of the following one by an all-to-all.

        With ``group.chunks`` above 1 a part that needs nothing of other ranks runs on chunks, along the axis on which
        its rows are independent, and the output of one is in transit while the next is computed.

        Args:
            run: function of tokens and their share of ``values`` that returns tokens.
            x: this rank's tokens in the layout of ``stage``.
            values: one value for each frame, ``[B F ...]``; see `per_frame`.
        """
        sources, targets = self.tokens(stage.layout), self.tokens(following.layout)
        return self._run_then_send(run, x, values, stage, sources, targets)

    def run_last(
        self, run: Callable[[Tensor, Tensor], Tensor], x: Tensor, values: Tensor, stage: Stage
    ) -> Tensor:
        """Run the last layer, and return its output for all frames of this rank's row."""
        by_token = stage._replace(reaches_others=False)
        return self._run_then_send(run, x, values, by_token, self.tokens(stage.layout), self.row_tokens)

    def _run_then_send(
        self,
        run: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        values: Tensor,
        stage: Stage,
        sources: Sequence[Tokens],
        targets: Sequence[Tokens],
    ) -> Tensor:
        along, tokens = stage.layout, self.frames * self.patches
        count = output_chunks(stage, sources, targets, tokens, self.group.chunks)
        if count == 1:
            return redistribute(run(x, self.per_frame(values, along)), self.group, sources, targets)
        chunks = [_chunks(each, along, count) for each in sources]
        own = sources[self.group.rank]
        outputs = (
            run(x[part.within(own)], _of_frames(values, part.frames)) for part in chunks[self.group.rank]
        )
        return redistribute_pipelined(outputs, self.group, chunks, targets)

    def switch(self, x: Tensor, source: Layout, target: Layout) -> Tensor:
        """Switch tokens ``[B T_n S_n D]`` to another layout by an all-to-all; every rank must call this."""
        return redistribute(x, self.group, self.tokens(source), self.tokens(target))

    def per_frame(self, values: Tensor, layout: Layout) -> Tensor:
        """Return the values of the frames that this rank has in a layout.

        Args:
            values: ``[B F ...]``, F = T, or 1 if all frames have the same.
        """
        return _of_frames(values, self.own(layout).frames)

    def split(self, latents: Tensor, dim: int) -> Tensor:
        """Return the latent frames of this rank's row (axis ``dim``); one frame for all is returned as it is."""
        if self.grid.time == 1 or latents.shape[dim] == 1 < self.frames:
            return latents
        own: Tensor = latents.split(self.latent_frames_per_row(latents.shape[dim]), dim)[
            self.column_group.rank
        ]
        return own

    def gather(self, latents: Tensor, dim: int, latent_frames: int) -> Tensor:
        """Return all ``latent_frames`` of latents of which each row has its share (axis ``dim``)."""
        return all_gather(latents, self.column_group, dim, self.latent_frames_per_row(latent_frames))

    def latent_frames_per_row(self, latent_frames: int) -> list[int]:
        """Return how many of ``latent_frames`` each row has: whole patches, except at the end of the video."""
        sizes = even_sizes(self.frames, self.grid.time)
        ends = [min(end * self.patch_frames, latent_frames) for end in accumulate(sizes, initial=0)]
        return [end - start for start, end in pairwise(ends)]


@dataclass(frozen=True, eq=False)
class TokenShard:
    """What a block asks of the other ranks that have tokens which it sees."""

    sharding: TokenSharding
    stage: Stage

    @property
    def tokens(self) -> Tokens:
        """This rank's tokens."""
        return self.sharding.own(self.stage.layout)

    def attend(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend over the rows ``[R h n d]`` of which other ranks have the rest."""
        everyone = self.sharding.tokens(self.stage.layout)
        if self.stage.kind == "S":
            ranks = self.sharding.grid.row(self.sharding.group.rank)
            lengths = [everyone[rank].patches.size for rank in ranks]
            return attend_over(self.sharding.row_group, lengths, attend, q, k, v)
        return attend_over(self.sharding.group, [each.size for each in everyone], attend, q, k, v)

    def gather_frames(self, x: Tensor) -> Tensor:
        """Return all frames ``[B T S_n D]`` of some patches, instead of the tokens of a temporal block's stage."""
        return self.sharding.switch(x, self.stage.layout, "space")

    def return_frames(self, x: Tensor) -> Tensor:
        """Return what all ranks got by `gather_frames` to where it came from."""
        return self.sharding.switch(x, "space", self.stage.layout)

    def with_neighbours(self, x: Tensor, frames: int, patches: int) -> tuple[Tensor, Tokens]:
        """Return the tokens with some more frames and patches around them, and which these are."""
        sharding = self.sharding
        sources = sharding.tokens(self.stage.layout)
        targets = with_halo(sources, frames, patches, sharding.frames, sharding.patches)
        return redistribute(x, sharding.group, sources, targets), targets[sharding.group.rank]

    def sum_states(self, states: Tensor, causal: bool) -> Tensor:
        """Add up states ``[T_n ...]`` of each frame over all ranks that have patches of it.

        Causal: ``[T_n ...]``, and the states of all earlier frames are added. Otherwise those of all frames,
        ``[1 ...]``.
        """
        group, layout = self.sharding.group, self.stage.layout
        if not causal:
            return sum_over(states.sum(0, keepdim=True), group, [range(group.size)] * group.size)
        same = {"grid": self.sharding.row_group, "space": group}.get(layout)
        if same is not None:
            states = sum_over(states, same, [range(same.size)] * same.size)
        states = states.cumsum(0)
        rows = {"grid": self.sharding.column_group, "time": group}.get(layout)
        if rows is None:
            return states
        total = states[-1:] if len(states) else states.sum(0, keepdim=True)  # part of the graph on every rank
        return states + sum_over(total, rows, [range(rank) for rank in range(rows.size)])


def _of_frames(values: Tensor, frames: Span) -> Tensor:
    return values if values.shape[1] == 1 else values[:, frames.begin : frames.end]


def _chunks(tokens: Tokens, along: Layout, count: int) -> list[Tokens]:
    """Split tokens along the axis that is divided among the ranks."""
    if along == "time":
        return [Tokens(frames, tokens.patches) for frames in tokens.frames.split(count)]
    return [Tokens(tokens.frames, patches) for patches in tokens.patches.split(count)]
