"""One adapter for the video and image VAEs of diffusers."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, Self

import diffusers
import torch
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from torch import Tensor

from stdit.codecs.base import VideoCodec
from stdit.codecs.config import CodecConfig
from stdit.codecs.loading import (
    DTYPES,
    WeightsSource,
    check_complete,
    dtype_name,
    explain_load_errors,
    locate_weights,
    named_dtype,
    quiet,
)
from stdit.codecs.streaming import STREAMING
from stdit.codecs.tiling import Cuts
from stdit.codecs.vaes import VAES
from stdit.errors import UserError

FRAMES_PER_PASS = 16
"""Frames that an image VAE gets at a time, which bounds its memory."""


class DiffusersCodec(VideoCodec):
    """A VAE of diffusers. Latents are the mode of its posterior, normalised with the VAE's own constants."""

    keeps_float32 = False

    def __init__(self, vae: ModelMixin) -> None:
        """Wrap a VAE of one of the classes in `VAES`, which is frozen and put in eval mode."""
        super().__init__()
        self.name = type(vae).__name__
        self.vae: Any = vae.eval().requires_grad_(False)
        self.kind = VAES[self.name]
        self.stream = STREAMING.get(self.name)
        self.stride = self.kind.stride(vae)
        self.causal_first_frame = self.kind.causal_first_frame
        self.independent_frames = self.kind.per_frame
        self.latent_frame_group = self.kind.latent_frame_group
        shift, factor = _normalisation(vae)
        self.channels = len(shift)
        # Not buffers, so that they stay in float32 when the VAE is moved to another precision.
        self.shift, self.factor = shift.view(-1, 1, 1, 1), factor.view(-1, 1, 1, 1)  # [C 1 1 1]

    @classmethod
    def from_config(cls, config: CodecConfig) -> Self:
        """Load the VAE at `config.path`.

        Raises:
            UserError: no such folder or hub id, another class, pickled or incomplete weights.
        """
        source = locate_weights("codec.path", config.path, config.subfolder)
        return cls(_load_vae(config.name, source, DTYPES[config.dtype]))

    def component(self) -> ModelMixin:
        return self if self._released else self.vae

    @property
    def cuts(self) -> Cuts:
        return replace(super().cuts, streams=self.stream is not None)

    def feature_bytes(self, latent_shape: Sequence[int]) -> int:
        channels = self.channels if self.stream is None else self.stream.channels(self.vae)
        return channels * prod(latent_shape) * self.dtype.itemsize

    def saved_settings(self) -> dict[str, Any]:
        return {"dtype": dtype_name(self.dtype)}

    def fingerprint(self) -> str:
        settings = {key: value for key, value in self.vae.config.items() if not key.startswith("_")}
        return self._hash({"vae": settings})

    def save(self, directory: Path) -> None:
        self.vae.save_pretrained(directory, safe_serialization=True)

    @classmethod
    def load(cls, directory: Path, settings: dict[str, Any], dtype: torch.dtype | None) -> "DiffusersCodec":
        source = locate_weights("the saved codec", str(directory), None)
        return cls(
            _load_vae(settings["name"], source, dtype or named_dtype(settings.get("dtype", "float32")))
        )

    def _encode(self, video: Tensor) -> Tensor:
        video = video.to(self.dtype)
        if self.kind.per_frame:
            latents = encode_images(self.vae, video)
        else:
            latents = self.vae.encode(video).latent_dist.mode()
        return (latents.float() - self.shift.to(latents.device)) * self.factor.to(latents.device)

    def _denormalise(self, latents: Tensor) -> Tensor:
        return (latents / self.factor.to(latents.device) + self.shift.to(latents.device)).to(self.dtype)

    def _features(self, latents: Tensor) -> Tensor:
        return latents if self.stream is None else self.stream.features(self.vae, self._denormalise(latents))

    def _decode_parts(self, parts: Iterable[Tensor], num_frames: Sequence[int]) -> Iterator[Tensor]:
        if self.stream is None:
            yield from super()._decode_parts(parts, num_frames)
        else:
            yield from self.stream.decode(self.vae, parts)

    def _decode(self, latents: Tensor) -> Tensor:
        z = self._denormalise(latents)
        with self._fixed_noise():
            if self.kind.per_frame:
                return decode_images(self.vae, z)
            if self.kind.timestep and self.vae.config.timestep_conditioning:
                return self.vae.decode(z, z.new_zeros(len(z))).sample
            return self.vae.decode(z).sample

    @contextmanager
    def _fixed_noise(self) -> Iterator[None]:
        """Give LTX decoders that add noise the same noise every time; torch's generators are left alone."""
        if not any(self.vae.config.get("decoder_inject_noise") or ()):
            yield
            return
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(0)
            yield


def encode_images(vae: Any, video: Tensor, per_pass: int = FRAMES_PER_PASS) -> Tensor:
    """Encode each frame of a video [B 3 T H W] by an image VAE -> [B C T H' W']."""
    images = rearrange(video, "b c t h w -> (b t) c h w").split(per_pass)
    modes = torch.cat([vae.encode(image).latent_dist.mode() for image in images])
    return rearrange(modes, "(b t) c h w -> b c t h w", b=len(video))


def decode_images(vae: Any, latents: Tensor, per_pass: int = FRAMES_PER_PASS) -> Tensor:
    """Decode each latent frame [B C T H' W'] by an image VAE -> [B 3 T H W]."""
    images = rearrange(latents, "b c t h w -> (b t) c h w").split(per_pass)
    decoded = torch.cat([vae.decode(image).sample for image in images])
    return rearrange(decoded, "(b t) c h w -> b c t h w", b=len(latents))


def _normalisation(vae: Any) -> tuple[Tensor, Tensor]:
    """Return (shift, factor), float32 [C] each: latents = (z - shift) * factor.

    As in diffusers' own pipelines: a mean and deviation per channel (Wan, LTX: there as buffers), or one
    shift and scaling factor (AutoencoderKL, CogVideoX, HunyuanVideo), or both kinds.
    """
    config = vae.config
    channels = config.get("latent_channels") or config["z_dim"]

    def numbers(name: str, default: float) -> Tensor:
        value = getattr(vae, name) if name in dict(vae.named_buffers()) else config.get(name)
        value = default if value is None else value
        return torch.as_tensor(value, dtype=torch.float32).flatten().expand(channels).clone()

    shift = numbers("latents_mean", 0.0) + numbers("shift_factor", 0.0)
    return shift, numbers("scaling_factor", 1.0) / numbers("latents_std", 1.0)


def _load_vae(name: str, source: WeightsSource, dtype: torch.dtype) -> ModelMixin:
    """Read a VAE of this class from safetensors."""
    vae_class: Any = getattr(diffusers, name)
    arguments = source.arguments()
    with explain_load_errors(name, source), quiet("diffusers"):
        saved_as = vae_class.load_config(**arguments).get("_class_name", name)
        if saved_as != name:
            known = f"use codec.name {saved_as}" if saved_as in VAES else f"use one of {', '.join(VAES)}"
            raise UserError(f"codec.name is {name}, but {str(source)!r} holds {saved_as}: {known}")
        vae, info = vae_class.from_pretrained(
            **arguments, torch_dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    check_complete(name, source, info["missing_keys"])
    return vae
