"""Video codecs (pixels to latents and back) and text encoders.

This module is light: what a codec needs is imported when the codec is built. A program that loads a saved
diffusers pipeline imports `stdit.codecs.pixel`, `pca`, `diffusers_vae` and `text` beforehand, since diffusers
looks components up only in modules that are imported already.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from stdit.codecs.config import CodecConfig, TextEncoderConfig

if TYPE_CHECKING:
    from stdit.codecs.base import VideoCodec

__all__ = ["CODECS", "CodecConfig", "TextEncoderConfig", "build_codec"]


def _pixel(config: CodecConfig) -> "VideoCodec":
    from stdit.codecs.pixel import PixelCodec

    return PixelCodec.from_config(config)


def _pca(config: CodecConfig) -> "VideoCodec":
    from stdit.codecs.pca import PCACodec

    return PCACodec.from_config(config)


def _diffusers(config: CodecConfig) -> "VideoCodec":
    from stdit.codecs.diffusers_vae import DiffusersCodec

    return DiffusersCodec.from_config(config)


def _opensora(config: CodecConfig) -> "VideoCodec":
    from stdit.codecs.opensora_vae import OpenSoraCodec

    return OpenSoraCodec.from_config(config)


CODECS: dict[str, Callable[[CodecConfig], "VideoCodec"]] = {
    "pixel": _pixel,
    "pca": _pca,
    "opensora": _opensora,
    "AutoencoderKL": _diffusers,
    "AutoencoderKLCogVideoX": _diffusers,
    "AutoencoderKLHunyuanVideo": _diffusers,
    "AutoencoderKLLTXVideo": _diffusers,
    "AutoencoderKLWan": _diffusers,
}


def build_codec(config: CodecConfig) -> "VideoCodec":
    """The codec that a config names, frozen and in eval mode, on the CPU.

    A pca codec without a path is not fitted yet: call its `fit`.

    Raises:
        UserError: unknown name, or weights that are missing, pickled or of another class.
    """
    from stdit.errors import UserError

    if config.name not in CODECS:
        raise UserError(f"codec.name is {config.name!r}, but the codecs are {', '.join(CODECS)}")
    return CODECS[config.name](config)
