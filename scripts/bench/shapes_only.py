"""A codec and a text encoder with the shapes of Open-Sora v1.2's, and without its weights: what they give is noise.

python train.py --import scripts.bench.shapes_only --codec.name opensora_shapes --text_encoder.name t5_shapes ...
"""

from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from stdit.codecs import TextEncoder, VideoCodec, register_codec, register_text_encoder
from stdit.codecs.config import CodecConfig
from stdit.codecs.opensora_vae import OpenSoraCodec


class OpenSoraShapes(OpenSoraCodec):
    """Latents as large as those of the VAE of Open-Sora v1.2."""

    name, stride, channels = "opensora_shapes", (4, 8, 8), 4
    chunk, latent_chunk = 17, 5

    def __init__(self) -> None:
        VideoCodec.__init__(self)

    def encode(self, video: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(
            len(video), self.channels, *self.latent_shape(*video.shape[2:]), generator=generator
        )

    @classmethod
    def from_config(cls, config: CodecConfig) -> Self:
        return cls()

    def saved_settings(self) -> dict[str, object]:
        return {}

    def save(self, directory: Path) -> None:
        pass

    def fingerprint(self) -> str:
        return self.name


class T5Shapes(TextEncoder):
    """States as wide and long as those of T5-XXL in Open-Sora v1.2."""

    name, channels, max_length = "t5_shapes", 4096, 300

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(len(texts), self.max_length, self.channels, generator=generator)
        return states, torch.ones(len(texts), self.max_length, dtype=torch.bool)


register_codec("opensora_shapes", OpenSoraShapes)
register_text_encoder("t5_shapes", T5Shapes)
