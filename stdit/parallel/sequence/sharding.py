"""How the tokens of a video lie on the ranks, and the switch between the two ways (arXiv:2403.10266, section 3).

Letters: B batch, T frames of tokens, S tokens of a frame, D width, N ranks; T_n and S_n are a rank's share.
"""

from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from typing import Literal

from torch import Tensor

from stdit.parallel.sequence.collectives import all_gather, all_to_all, all_to_all_pipelined
from stdit.parallel.sequence.group import Group

ShardAxis = Literal["time", "space"]
"""The axis that is split over the ranks. time: a rank has whole frames, ``[B T_n S D]``; space: all frames of some
patches, ``[B T S_n D]``."""


def even_sizes(total: int, ranks: int) -> list[int]:
    """Split ``total`` into a share for each rank; the first ``total % ranks`` get one more."""
    each, rest = divmod(total, ranks)
    return [each + (rank < rest) for rank in range(ranks)]


def micro_batches(parts: list[int], part: int, most: int | None) -> list[tuple[slice, bool]]:
    """Slices of a part of a batch, of at most ``most`` samples, and whether they count.

    Every part has as many, to wait for each other: where one has no sample left, it has one that does not count.

    Args:
        parts: samples of each part, the largest first.
    """
    size = most or parts[0]
    return [
        (slice(start, start + size), True) if start < parts[part] else (slice(1), False)
        for start in range(0, parts[0], size)
    ]


def block_shard_axes(depth: int, order: str) -> list[ShardAxis]:
    """Layouts of the blocks in the order in which they run: S T S T ..., or S T T S ... when paired."""
    pair: tuple[ShardAxis, ShardAxis] = ("time", "space")
    turn = -1 if order == "paired" else 1
    return [shard for index in range(depth) for shard in pair[:: turn**index]]


class TokenSharding:
    """The tokens of one batch of videos, spread over a group.

    Args:
        group: the ranks that share each video.
        frames: T.
        patches: S.
        patch_frames: latent frames of one token.
    """

    def __init__(self, group: Group, frames: int, patches: int, patch_frames: int = 1) -> None:
        self.group, self.frames, self.patches, self.patch_frames = group, frames, patches, patch_frames
        self.frames_per_rank, self.patches_per_rank = (
            even_sizes(frames, group.size),
            even_sizes(patches, group.size),
        )

    def switch(self, x: Tensor, source: ShardAxis, target: ShardAxis) -> Tensor:
        """Bring ``x``, ``[B T_n S D]`` or ``[B T S_n D]``, to another shard; every rank must call this."""
        if source == target:
            return x
        if target == "space":
            return all_to_all(x, self.group, 2, self.patches_per_rank, 1, self.frames_per_rank)
        return all_to_all(x, self.group, 1, self.frames_per_rank, 2, self.patches_per_rank)

    def run_then_switch(
        self,
        stage: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        values: Tensor,
        shard: ShardAxis,
        following: ShardAxis,
    ) -> Tensor:
        """Run a stage of the model, and bring its result to the sharded axis of the stage that follows.

        With ``group.chunks`` above 1 the stage runs on pieces of the sharded axis, along which its rows know
        nothing of each other, and each result is on its way while the next is computed.

        Args:
            stage: from tokens and their share of ``values`` to tokens.
            x: tokens in ``shard``.
            values: something for all frames, ``[B F ...]``, see `per_frame`.
        """
        pieces = min(self.group.chunks, max(self._sharded(shard)))
        if shard == following or pieces == 1 or self.group.size == 1:
            return self.switch(stage(x, self.per_frame(values, shard)), shard, following)
        results = (stage(*piece) for piece in self._pieces(x, values, shard, pieces))
        sizes = [even_sizes(share, pieces) for share in self._sharded(shard)]
        scatter_dim, gather_dim = (2, 1) if shard == "time" else (1, 2)
        return all_to_all_pipelined(
            results, self.group, scatter_dim, self._sharded(following), gather_dim, sizes
        )

    def _sharded(self, shard: ShardAxis) -> list[int]:
        """What each rank has of the axis that is sharded in a shard."""
        return self.frames_per_rank if shard == "time" else self.patches_per_rank

    def _pieces(
        self, x: Tensor, values: Tensor, shard: ShardAxis, pieces: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens with their share of per-frame values, in pieces of the sharded axis."""
        sizes = even_sizes(self._sharded(shard)[self.group.rank], pieces)
        local = self.per_frame(values, shard)
        if shard == "space":
            return ((piece, local) for piece in x.split(sizes, dim=2))
        parts = [local] * pieces if values.shape[1] == 1 else local.split(sizes, dim=1)
        return zip(x.split(sizes, dim=1), parts, strict=True)

    def per_frame(self, values: Tensor, shard: ShardAxis) -> Tensor:
        """Of ``values [B F ...]`` for all frames (F = T, or 1 for all alike), those of the frames in ``shard``."""
        if shard == "space" or values.shape[1] == 1:
            return values
        return values.split(self.frames_per_rank, dim=1)[self.group.rank]

    def split(self, latents: Tensor, dim: int) -> Tensor:
        """This rank's share of something that has latent frames along ``dim``; one for all frames is left alone."""
        if self.group.size == 1 or latents.shape[dim] == 1 < self.frames:
            return latents
        return latents.split(self.latent_frames_per_rank(latents.shape[dim]), dim)[self.group.rank]

    def gather(self, latents: Tensor, dim: int, latent_frames: int) -> Tensor:
        """All ``latent_frames`` of something of which each rank has its share along ``dim``."""
        return all_gather(latents, self.group, dim, self.latent_frames_per_rank(latent_frames))

    def latent_frames_per_rank(self, latent_frames: int) -> list[int]:
        """Latent frames of each rank, of so many in all: whole patches, but for the last."""
        ends = [
            min(end * self.patch_frames, latent_frames) for end in accumulate(self.frames_per_rank, initial=0)
        ]
        return [end - start for start, end in pairwise(ends)]
