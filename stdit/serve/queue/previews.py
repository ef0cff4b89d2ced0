"""Previews of videos that are being made: the clean video that a step aims at, decoded cheaply.

Letters: B videos, C latent channels, T frames, H rows, W columns; T' H' W' of the latents.
"""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stdit.serve.webp import webp_of_frames

if TYPE_CHECKING:
    from torch import Tensor

    from stdit.codecs.base import VideoCodec

MAX_FRAMES = 8
_MOST_PIXELS = 192
"""Of a preview's longer side."""
SHARE = 0.2
"""Part of the time of the steps that previews may take."""
SLOW_DECODING = 1.0
"""Seconds above which latents are shown as colours instead of being decoded."""


@dataclass
class Previewer:
    """Previews of a batch, as often as they take little of its time, the first one at once."""

    codec: "VideoCodec"
    _next: float = 0.0
    _colors: "Tensor | None" = None
    """Linear map from latents to colours ``[C + 1, 3]``, once decoding has been slow."""
    _is_slow: bool = False

    def begin(self) -> None:
        """Begin with another batch."""
        self._next = 0.0

    def is_due(self) -> bool:
        """Return whether it is time for the next preview."""
        return time.monotonic() >= self._next

    def make(
        self, clean_latents: "Tensor", num_frames: int, height: int, width: int, fps: float
    ) -> list[bytes]:
        """Return an animated WebP of each video.

        Args:
            clean_latents: ``[B C T' H' W']``.
            num_frames, height, width: of the videos.
        """
        began = time.monotonic()
        try:
            shown = [self._frames(one[None], num_frames, height, width) for one in clean_latents]
            rate = fps * len(shown[0]) / num_frames
            return [webp_of_frames(frames, rate, _MOST_PIXELS) for frames in shown]
        except Exception:
            self._is_slow = True  # such as for lack of memory
            raise
        finally:
            took = time.monotonic() - began
            self._is_slow = self._is_slow or took / len(clean_latents) > SLOW_DECODING
            self._next = time.monotonic() + took / SHARE - took

    def _frames(self, latents: "Tensor", num_frames: int, height: int, width: int) -> np.ndarray:
        """Return some frames of a video, uint8 ``[T H W 3]``."""
        if self._is_slow or latents[0, 0].numel() > 2**16:
            pixels = self._as_colors(latents)
        else:
            pixels = self.codec.decode(latents, num_frames, height, width)[0].permute(1, 2, 3, 0)
        chosen = np.linspace(0, len(pixels) - 1, min(MAX_FRAMES, len(pixels))).round().astype(int)
        levels: np.ndarray = (
            pixels[chosen.tolist()].float().add(1).mul(127.5).clamp(0, 255).byte().cpu().numpy()
        )
        return levels

    def _as_colors(self, latents: "Tensor") -> "Tensor":
        """Return latents ``[1 C T' H' W']`` as pixels ``[T' H' W' 3]`` in [-1, 1], by the linear map of the codec."""
        import torch

        if self._colors is None:
            self._colors = fit_colors(self.codec)
        values = latents[0].permute(1, 2, 3, 0).float()  # [T' H' W' C]
        return torch.cat([values, torch.ones_like(values[..., :1])], -1) @ self._colors.to(values)


def fit_colors(codec: "VideoCodec", patches: int = 6) -> "Tensor":
    """Return the linear map ``[C + 1, 3]`` from a latent and 1 to the mean colour of its pixels, by least squares.

    It is fitted to a small video of random latents that the codec decodes, so that it needs no data.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    frames = 1 + codec.latent_frame_group
    latents = torch.randn(1, codec.channels, frames, patches, patches, generator=generator).to(codec.device)
    pixels = codec.decode(latents)[0]  # [3 T H W]
    means = torch.nn.functional.adaptive_avg_pool3d(pixels[None].float(), (frames, patches, patches))[0]
    inputs = latents[0].flatten(1).T.float()  # [T' H' W', C]
    inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1)
    ridge = 1e-3 * torch.eye(inputs.shape[1], device=inputs.device)
    return torch.linalg.solve(inputs.T @ inputs + ridge, inputs.T @ means.flatten(1).T)
