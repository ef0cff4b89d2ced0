"""Lossless codec: the latents are the pixels."""

from typing import Self

from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  (diffusers looks for it here)
from torch import Tensor

from stdit.codecs.base import VideoCodec
from stdit.codecs.config import CodecConfig
from stdit.errors import UserError


class PixelCodec(VideoCodec):
    """Latents [B 3 T H W] are the video itself, in [-1, 1]."""

    name = "pixel"
    stride = (1, 1, 1)
    channels = 3
    independent_frames = True

    @classmethod
    def from_config(cls, config: CodecConfig) -> Self:
        """Raise UserError if the config has a path, which would be ignored."""
        if config.path is not None:
            raise UserError(
                f"codec.path is {config.path!r}, but the pixel codec has no weights: leave codec.path out"
            )
        return cls()

    def _encode(self, video: Tensor) -> Tensor:
        return video

    def _decode(self, latents: Tensor) -> Tensor:
        return latents
