"""The VAEs of diffusers that can be codecs: one row each. Imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class VAEFacts:
    """How one class of VAE differs from the others."""

    stride: Callable[[Any], tuple[int, int, int]]
    """Reads frames, rows and columns of pixels per latent from the VAE."""

    causal_first_frame: bool = True
    """The first latent frame stands for a single frame."""

    latent_frame_group: int = 1
    """Latent frames after the first must come in multiples of this."""

    per_frame: bool = False
    """An image VAE: each frame is an image."""

    timestep: bool = False
    """The decoder takes the noise level of its latents (a timestep; 0, as in diffusers)."""


def _wan_stride(vae: Any) -> tuple[int, int, int]:
    return vae.config.scale_factor_temporal, vae.config.scale_factor_spatial, vae.config.scale_factor_spatial


def _cogvideox_stride(vae: Any) -> tuple[int, int, int]:
    spatial = 2 ** (len(vae.config.block_out_channels) - 1)
    return int(vae.config.temporal_compression_ratio), spatial, spatial


def compression_ratios(vae: Any) -> tuple[int, int, int]:
    """Return the stride of a VAE that states its own compression ratios."""
    return vae.temporal_compression_ratio, vae.spatial_compression_ratio, vae.spatial_compression_ratio


def _image_stride(vae: Any) -> tuple[int, int, int]:
    spatial = 2 ** (len(vae.config.block_out_channels) - 1)
    return 1, spatial, spatial


VAES: dict[str, VAEFacts] = {
    "AutoencoderKL": VAEFacts(_image_stride, causal_first_frame=False, per_frame=True),
    # It decodes latent frames in pairs, the first three together: an even count comes back as 4 T' frames.
    "AutoencoderKLCogVideoX": VAEFacts(_cogvideox_stride, latent_frame_group=2),
    "AutoencoderKLHunyuanVideo": VAEFacts(compression_ratios),
    "AutoencoderKLLTXVideo": VAEFacts(compression_ratios, timestep=True),
    "AutoencoderKLWan": VAEFacts(_wan_stride),
}
"""Name of the class in diffusers to its facts. `stdit.codecs.register_diffusers_vae` adds one from outside."""
