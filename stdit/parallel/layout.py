"""How the tokens of a video lie on the ranks, and the switch between the two ways (arXiv:2403.10266, section 3).

Letters: B batch, T frames of tokens, S tokens of a frame, D width, N ranks; T_n and S_n are a rank's share.
"""

from itertools import accumulate, pairwise
from typing import Literal

from torch import Tensor

from stdit.parallel.collectives import gather, reshard
from stdit.parallel.group import Group

Layout = Literal["frames", "tracks"]
"""frames: each rank holds whole frames, ``[B T_n S D]``; tracks: whole time lines, ``[B T S_n D]``."""


def shares(total: int, ranks: int) -> list[int]:
    """Split ``total`` into a share for each rank; the first ``total % ranks`` get one more."""
    each, rest = divmod(total, ranks)
    return [each + (rank < rest) for rank in range(ranks)]


class Shards:
    """The tokens of one batch of videos, spread over a group.

    Args:
        group: the ranks that share each video.
        frames: T.
        tracks: S.
        patch_frames: latent frames of one token.
    """

    def __init__(self, group: Group, frames: int, tracks: int, patch_frames: int = 1) -> None:
        self.group, self.frames, self.tracks, self.patch_frames = group, frames, tracks, patch_frames
        self.frames_of, self.tracks_of = shares(frames, group.size), shares(tracks, group.size)

    def switch(self, x: Tensor, source: Layout, target: Layout) -> Tensor:
        """Bring ``x``, ``[B T_n S D]`` or ``[B T S_n D]``, to another layout; every rank must call this."""
        if source == target:
            return x
        if target == "tracks":
            return reshard(x, self.group, 2, self.tracks_of, 1, self.frames_of)
        return reshard(x, self.group, 1, self.frames_of, 2, self.tracks_of)

    def per_frame(self, values: Tensor, layout: Layout) -> Tensor:
        """Of ``values [B F ...]`` for all frames (F = T, or 1 for all alike), those of the frames in ``layout``."""
        if layout == "tracks" or values.shape[1] == 1:
            return values
        return values.split(self.frames_of, dim=1)[self.group.rank]

    def split(self, latents: Tensor, dim: int) -> Tensor:
        """This rank's share of something that has latent frames along ``dim``; one for all frames is left alone."""
        if self.group.size == 1 or latents.shape[dim] == 1 < self.frames:
            return latents
        return latents.split(self.latent_frames_of(latents.shape[dim]), dim)[self.group.rank]

    def gather(self, latents: Tensor, dim: int, latent_frames: int) -> Tensor:
        """All ``latent_frames`` of something of which each rank has its share along ``dim``."""
        return gather(latents, self.group, dim, self.latent_frames_of(latent_frames))

    def latent_frames_of(self, latent_frames: int) -> list[int]:
        """Latent frames of each rank, of so many in all: whole patches, but for the last."""
        ends = [min(end * self.patch_frames, latent_frames) for end in accumulate(self.frames_of, initial=0)]
        return [end - start for start, end in pairwise(ends)]
