"""Sharding of a video's tokens over ranks, and the switch between the two sharded axes (arXiv:2403.10266, section 3).

Letters: B batch, T frames of tokens, S tokens of a frame, D width, N ranks; T_n and S_n are one rank's share.
"""

from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from typing import Literal

from torch import Tensor

from stdit.parallel.sequence.collectives import all_gather, all_to_all, all_to_all_pipelined
from stdit.parallel.sequence.group import Group

ShardAxis = Literal["time", "space"]
"""The axis that is sharded over the ranks. time: a rank has whole frames, ``[B T_n S D]``; space: a rank has all
frames of some patches, ``[B T S_n D]``."""


def even_sizes(total: int, ranks: int) -> list[int]:
    """Split ``total`` evenly over ranks; the first ``total % ranks`` get one more."""
    each, rest = total // ranks, total % ranks  # torch.compile takes no divmod of a symbolic size
    return [each + (rank < rest) for rank in range(ranks)]


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


def block_shard_axes(depth: int, order: str) -> list[ShardAxis]:
    """Return the sharded axis of each block, in the order in which blocks run.

    Spatial blocks (S) run while time is sharded, temporal blocks (T) while space is: S T S T ... for the order
    "alternate", S T T S S T T S ... for "paired".
    """
    pair: tuple[ShardAxis, ShardAxis] = ("time", "space")
    turn = -1 if order == "paired" else 1
    return [axis for index in range(depth) for axis in pair[:: turn**index]]


class TokenSharding:
    """How the tokens of a batch of videos are sharded over a group of ranks.

    Args:
        group: the ranks that share each video.
        frames: frames of tokens, T.
        patches: tokens of a frame, S.
        patch_frames: latent frames of one token.
    """

    def __init__(self, group: Group, frames: int, patches: int, patch_frames: int = 1) -> None:
        self.group, self.frames, self.patches, self.patch_frames = group, frames, patches, patch_frames
        self.frames_per_rank = even_sizes(frames, group.size)
        self.patches_per_rank = even_sizes(patches, group.size)

    def switch(self, x: Tensor, source: ShardAxis, target: ShardAxis) -> Tensor:
        """Switch the sharded axis of tokens ``x`` by an all-to-all; every rank must call this.

        Args:
            x: ``[B T_n S D]`` if ``source`` is "time", ``[B T S_n D]`` if it is "space".

        Returns:
            The tokens sharded along ``target``: ``x`` itself if that is ``source``.
        """
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
        """Run a stage of the model, and switch its output to the sharded axis of the following stage.

        With ``group.chunks`` above 1 the stage runs on chunks of the sharded axis, along which its rows are
        independent, and the output of one chunk is in transit while the next is computed.

        Args:
            stage: function of tokens and their share of ``values`` that returns tokens.
            x: tokens, sharded along ``shard``.
            values: one value for each frame, ``[B F ...]``; see `per_frame`.
        """
        sizes = self._sizes(shard)
        count = min(self.group.chunks, max(sizes))
        if shard == following or count == 1 or self.group.size == 1:
            return self.switch(stage(x, self.per_frame(values, shard)), shard, following)
        outputs = (stage(*chunk) for chunk in self._chunks(x, values, shard, count))
        chunk_sizes = [even_sizes(size, count) for size in sizes]
        scatter_dim, gather_dim = (2, 1) if shard == "time" else (1, 2)
        return all_to_all_pipelined(
            outputs, self.group, scatter_dim, self._sizes(following), gather_dim, chunk_sizes
        )

    def _sizes(self, shard: ShardAxis) -> list[int]:
        """Return each rank's share of the sharded axis."""
        return self.frames_per_rank if shard == "time" else self.patches_per_rank

    def _chunks(
        self, x: Tensor, values: Tensor, shard: ShardAxis, count: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Split tokens and their per-frame values into chunks of the sharded axis."""
        sizes = even_sizes(self._sizes(shard)[self.group.rank], count)
        own = self.per_frame(values, shard)
        if shard == "space":
            return ((chunk, own) for chunk in x.split(sizes, dim=2))
        parts = [own] * count if values.shape[1] == 1 else own.split(sizes, dim=1)
        return zip(x.split(sizes, dim=1), parts, strict=True)

    def per_frame(self, values: Tensor, shard: ShardAxis) -> Tensor:
        """Return the values of the frames that this rank holds while ``shard`` is sharded.

        Args:
            values: ``[B F ...]``, F = T, or 1 if all frames have the same.
        """
        if shard == "space" or values.shape[1] == 1:
            return values
        own: Tensor = values.split(self.frames_per_rank, dim=1)[self.group.rank]
        return own

    def split(self, latents: Tensor, dim: int) -> Tensor:
        """Return this rank's latent frames (axis ``dim``); a tensor with one frame for all is returned as it is."""
        if self.group.size == 1 or latents.shape[dim] == 1 < self.frames:
            return latents
        own: Tensor = latents.split(self.latent_frames_per_rank(latents.shape[dim]), dim)[self.group.rank]
        return own

    def gather(self, latents: Tensor, dim: int, latent_frames: int) -> Tensor:
        """Return all ``latent_frames`` of latents of which each rank has its share (axis ``dim``)."""
        return all_gather(latents, self.group, dim, self.latent_frames_per_rank(latent_frames))

    def latent_frames_per_rank(self, latent_frames: int) -> list[int]:
        """Return how many of ``latent_frames`` each rank has: whole patches, except at the end of the video."""
        ends = [
            min(end * self.patch_frames, latent_frames) for end in accumulate(self.frames_per_rank, initial=0)
        ]
        return [end - start for start, end in pairwise(ends)]
