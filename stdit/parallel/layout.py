"""How the tokens of a video lie on the ranks, and the switch between the two ways (arXiv:2403.10266, section 3).

Letters: B batch, T frames of tokens, S tokens of a frame, D width, N ranks; T_n and S_n are a rank's share.
"""

from typing import Literal

from torch import Tensor

from stdit.parallel.collectives import reshard
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

    @property
    def local_frames(self) -> slice:
        """Which frames of tokens are this rank's in the layout "frames"."""
        start = sum(self.frames_of[: self.group.rank])
        return slice(start, start + self.frames_of[self.group.rank])

    def switch(self, x: Tensor, source: Layout, target: Layout) -> Tensor:
        """Bring ``x``, ``[B T_n S D]`` or ``[B T S_n D]``, to another layout; every rank must call this."""
        if source == target:
            return x
        if target == "tracks":
            return reshard(x, self.group, 2, self.tracks_of, 1, self.frames_of)
        return reshard(x, self.group, 1, self.frames_of, 2, self.tracks_of)

    def per_frame(self, values: Tensor, layout: Layout) -> Tensor:
        """Of ``values [B F ...]`` for all frames (F = T, or 1 for all alike), those of the frames in ``layout``."""
        return values if layout == "tracks" or values.shape[1] == 1 else values[:, self.local_frames]

    def split(self, latents: Tensor, dim: int) -> Tensor:
        """This rank's share of something that has latent frames along ``dim``; one for all frames is left alone."""
        if self.group.size == 1 or latents.shape[dim] == 1 < self.frames:
            return latents
        local = self.local_frames
        start, stop = (min(i * self.patch_frames, latents.shape[dim]) for i in (local.start, local.stop))
        return latents.narrow(dim, start, stop - start)
