"""Video codecs (pixels to latents and back) and text encoders (captions to token states).

Importing this package imports no torch: a codec's module is imported when the codec is built.
"""

from typing import TYPE_CHECKING

from stdit.codecs.build import (
    build_codec,
    build_text_encoder,
    register_codec,
    register_diffusers_vae,
    register_text_encoder,
)
from stdit.codecs.config import CODECS, TEXT_ENCODERS, CodecConfig, TextEncoderConfig
from stdit.codecs.vaes import VAEFacts
from stdit.lazy import lazy_getattr

if TYPE_CHECKING:
    from stdit.codecs.base import VideoCodec
    from stdit.codecs.text import TextEncoder

__all__ = [
    "CODECS",
    "TEXT_ENCODERS",
    "CodecConfig",
    "TextEncoder",
    "TextEncoderConfig",
    "VAEFacts",
    "VideoCodec",
    "build_codec",
    "build_text_encoder",
    "register_codec",
    "register_diffusers_vae",
    "register_text_encoder",
]

__getattr__ = lazy_getattr(__name__, {"VideoCodec": "stdit.codecs.base", "TextEncoder": "stdit.codecs.text"})
