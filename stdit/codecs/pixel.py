"""The lossless codec: latents are the pixels."""

from pathlib import Path
from typing import Any, Self

import torch
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  (diffusers looks for it here)
from torch import Tensor

from stdit.codecs.base import VideoCodec
from stdit.codecs.config import CodecConfig
from stdit.errors import UserError


class PixelCodec(VideoCodec):
    """Latents [B 3 T H W] are the video itself, in [-1, 1]."""

    name = "pixel"
    frames_alone = True
    stride = (1, 1, 1)
    channels = 3

    def __init__(self) -> None:
        super().__init__()
        # Without weights there would be nothing that knows the device.
        self.register_buffer("placement", torch.empty(0), persistent=False)

    @classmethod
    def from_config(cls, config: CodecConfig) -> Self:
        """Raises UserError if the config has a path, which the pixel codec could only ignore."""
        if config.path is not None:
            raise UserError(
                f"codec.path is {config.path!r}, but the pixel codec has no weights: leave codec.path out"
            )
        return cls()

    @classmethod
    def load(cls, directory: Path, facts: dict[str, Any], dtype: torch.dtype | None) -> "PixelCodec":
        return cls()

    def _encode(self, video: Tensor) -> Tensor:
        return video

    def _decode(self, latents: Tensor) -> Tensor:
        return latents
