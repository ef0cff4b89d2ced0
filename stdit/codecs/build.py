"""Build the codec or text encoder that a config names, and register new ones."""

from typing import TYPE_CHECKING

from stdit.codecs.config import CODECS, DIFFUSERS_CODEC, TEXT_ENCODERS, CodecConfig, TextEncoderConfig
from stdit.codecs.vaes import VAES, VAEFacts

if TYPE_CHECKING:
    from stdit.codecs.base import VideoCodec
    from stdit.codecs.text import TextEncoder


def register_codec(name: str, codec: "type[VideoCodec] | str") -> None:
    """Make ``codec.name = name`` stand for a codec.

    Args:
        codec: a subclass of `VideoCodec` whose attribute ``name`` is the same, or ``"module:Class"`` to import it
            when it is built.

    Raises:
        UserError: if another codec has the name.
    """
    assert isinstance(codec, str) or codec.name == name, f"{codec}.name must be {name!r}"
    CODECS.register(name, codec)


def register_diffusers_vae(name: str, facts: VAEFacts) -> None:
    """Make ``codec.name = name`` stand for a VAE class of diffusers.

    Args:
        name: of the class, such as ``AutoencoderKLWan``. Its ``encode(video).latent_dist`` has a mode, and its config
            has the usual numbers: ``latent_channels`` or ``z_dim``, and ``scaling_factor`` or ``latents_mean``.

    Raises:
        UserError: if another codec has the name.
    """
    CODECS.register(name, DIFFUSERS_CODEC)
    VAES[name] = facts


def register_text_encoder(name: str, encoder: "type[TextEncoder] | str") -> None:
    """Make ``text_encoder.name = name`` stand for a text encoder.

    Args:
        encoder: a subclass of `TextEncoder`, or ``"module:Class"`` to import it when it is built.

    Raises:
        UserError: if another text encoder has the name.
    """
    TEXT_ENCODERS.register(name, encoder)


def build_codec(config: CodecConfig) -> "VideoCodec":
    """Build the codec that a config names, frozen and in eval mode, on the CPU.

    A pca codec without a path is not fitted yet: call its `fit`.

    Raises:
        UserError: unknown name, or weights that are missing, pickled or of another class.
    """
    codec: VideoCodec = CODECS.get(config.name).from_config(config)
    codec.enable_tiling(config.tile)
    return codec


def build_text_encoder(config: TextEncoderConfig) -> "TextEncoder":
    """Build the text encoder that a config names, frozen and in eval mode, on the CPU.

    Raises:
        UserError: unknown name, a package that is not installed, no such folder or hub id, pickled or incomplete
            weights, or a kind of model that the name does not stand for.
    """
    return TEXT_ENCODERS.get(config.name).from_config(config)
