"""Which rank has which tokens of a video: rectangles of frames and patches on a grid of ranks. Imports no torch.

Letters: T frames of tokens, S tokens of a frame, P_t x P_s ranks; rank (i, j) is rank ``i P_s + j`` of the group.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple

Layout = Literal["time", "space", "grid"]
"""Which axes are divided. grid: rank (i, j) has the patches S_j of the frames T_i. time: it has whole frames, some of
T_i. space: it has all frames of some patches of S_j."""


def even_sizes(total: int, ranks: int) -> list[int]:
    """Split ``total`` evenly over ranks; the first ``total % ranks`` get one more."""
    each, rest = total // ranks, total % ranks  # torch.compile takes no divmod of a symbolic size
    return [each + (rank < rest) for rank in range(ranks)]


class Span(NamedTuple):
    """The places [begin, end) of an axis."""

    begin: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.begin

    def split(self, ranks: int) -> list["Span"]:
        """Split evenly over ranks, in order."""
        ends = accumulate(even_sizes(self.size, ranks), initial=self.begin)
        return [Span(*ends) for ends in pairwise(ends)]

    def common(self, other: "Span") -> "Span":
        """Return the places in both; an empty span if there is none."""
        begin = max(self.begin, other.begin)
        return Span(begin, max(begin, min(self.end, other.end)))

    def widened(self, by: int, limit: int) -> "Span":
        """Return the span with ``by`` more places on both sides, between 0 and ``limit``; an empty one stays."""
        return Span(max(0, self.begin - by), min(limit, self.end + by)) if self.size else self

    def within(self, outer: "Span") -> slice:
        """Return the places as a slice of those of ``outer``."""
        return slice(self.begin - outer.begin, self.end - outer.begin)


class Tokens(NamedTuple):
    """The patches of some frames."""

    frames: Span
    patches: Span

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self.frames.size * self.patches.size

    def common(self, other: "Tokens") -> "Tokens":
        """Return the tokens in both."""
        return Tokens(self.frames.common(other.frames), self.patches.common(other.patches))

    def within(self, outer: "Tokens") -> tuple[slice, slice, slice]:
        """Return the index of these tokens in a tensor ``[B T S ...]`` of those of ``outer``."""
        return slice(None), self.frames.within(outer.frames), self.patches.within(outer.patches)


class Grid(NamedTuple):
    """Ranks that share a video: ``time`` rows, which divide its frames, of ``space`` ranks, which divide patches."""

    time: int
    space: int

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.time * self.space

    def row(self, rank: int) -> tuple[int, ...]:
        """Return the ranks that have the same frames."""
        begin = rank // self.space * self.space
        return tuple(range(begin, begin + self.space))

    def column(self, rank: int) -> tuple[int, ...]:
        """Return the ranks that have the same patches."""
        return tuple(range(rank % self.space, self.size, self.space))

    def rows(self, frames: int) -> list[Span]:
        """Return the frames of the row of each rank."""
        return [span for span in Span(0, frames).split(self.time) for _ in range(self.space)]

    def tokens(self, layout: Layout, frames: int, patches: int) -> list[Tokens]:
        """Return the tokens of each rank."""
        T, S = Span(0, frames).split(self.time), Span(0, patches).split(self.space)
        if layout == "time":
            return [Tokens(own, Span(0, patches)) for of_row in T for own in of_row.split(self.space)]
        if layout == "space":
            of_columns = [of_column.split(self.time) for of_column in S]
            return [
                Tokens(Span(0, frames), of_columns[j][i]) for i in range(self.time) for j in range(self.space)
            ]
        return [Tokens(of_row, of_column) for of_row in T for of_column in S]

    def __str__(self) -> str:
        return f"[{self.time}, {self.space}]"


def with_halo(
    tokens: Sequence[Tokens], more_frames: int, more_patches: int, frames: int, patches: int
) -> list[Tokens]:
    """Return the tokens of each rank with some more around them, of the ``frames x patches`` of a video."""
    return [
        Tokens(each.frames.widened(more_frames, frames), each.patches.widened(more_patches, patches))
        for each in tokens
    ]
