"""The video VAE of Open-Sora v1.2: an image VAE for each frame, and over its latents a VAE along time.

Zheng et al. 2024 (arXiv:2412.20404), section 3.1. Module names are those of the released weights
(hpcai-tech/OpenSora-VAE-v1.2): ``spatial_vae.module.*``, an AutoencoderKL of diffusers with SDXL's sizes, and
``temporal_vae.*``, causal 3-D convolutions in the manner of MAGVIT-v2 (Yu et al. 2023, arXiv:2310.05737).

Letters: B batch, C channels, T frames, H height, W width; T' latent frames.
"""

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import AutoencoderKL
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  (diffusers looks for it here)
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import pad, silu

from stdit.codecs.base import VideoCodec
from stdit.codecs.config import CodecConfig
from stdit.codecs.diffusers_vae import decode_images, encode_images
from stdit.codecs.loading import (
    DTYPES,
    WeightsSource,
    dtype_name,
    explain_load_errors,
    locate_weights,
    named_dtype,
    read_json,
    write_json,
)
from stdit.codecs.tiling import Cuts
from stdit.models.opensora import check_keys, read_weights

IMAGES_PER_PASS = 4
"""Frames that the spatial VAE gets at a time, which bounds its memory."""


@dataclass(frozen=True)
class OpenSoraVAEConfig:
    """Settings of the VAE, by default of the released one; other keys of its config.json are ignored."""

    micro_frame_size: int = 17
    """Frames of a chunk; chunks are encoded independently."""
    shift: tuple[float, ...] = (-0.10, 0.34, 0.27, 0.98)
    """Mean of each latent channel, which is subtracted."""
    scale: tuple[float, ...] = (3.85, 2.32, 2.33, 3.06)
    """Standard deviation of each latent channel, by which it is divided."""
    spatial_factor: float = 0.18215
    """Factor of the image VAE's latents in Open-Sora (not the 0.13025 of SDXL's own config)."""
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    """Widths of the image VAE; each level but the last halves rows and columns."""
    filters: int = 128
    """Width of the temporal VAE's first level."""
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4)
    """Widths of its levels, in multiples of that."""
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    """After which levels the number of frames is halved."""
    num_res_blocks: int = 4
    """Residual blocks of a level, and of the innermost part."""
    norm_num_groups: int = 32
    """Groups of all normalisations."""

    @classmethod
    def read(cls, recorded: dict[str, Any]) -> Self:
        """Read the settings from the content of a config.json, of Open-Sora or of stdit."""
        known: dict[str, Any] = {}
        for name in [f.name for f in fields(cls) if f.name in recorded]:
            known[name] = tuple(recorded[name]) if isinstance(recorded[name], list) else recorded[name]
        return cls(**known)


class CausalConv3d(nn.Module):
    """Convolution that is causal in time: zero padding before the first frame, and around each frame."""

    def __init__(
        self, channels_in: int, channels_out: int, kernel: int, time_stride: int = 1, bias: bool = True
    ) -> None:
        super().__init__()
        edge = kernel // 2
        self.padding = (edge, edge, edge, edge, kernel - time_stride, 0)
        self.conv = nn.Conv3d(channels_in, channels_out, kernel, stride=(time_stride, 1, 1), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(pad(x, self.padding))


class ResBlock(nn.Module):
    """Residual block of two normalised convolutions; conv3 changes the width of the input if necessary."""

    def __init__(self, channels_in: int, channels_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels_in)
        self.conv1 = CausalConv3d(channels_in, channels_out, 3, bias=False)
        self.norm2 = nn.GroupNorm(groups, channels_out)
        self.conv2 = CausalConv3d(channels_out, channels_out, 3, bias=False)
        if channels_in != channels_out:
            self.conv3 = CausalConv3d(channels_in, channels_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(silu(self.norm1(x)))
        y = self.conv2(silu(self.norm2(y)))
        return y + (self.conv3(x) if hasattr(self, "conv3") else x)


def _level(channels_in: int, channels_out: int, config: OpenSoraVAEConfig) -> nn.Sequential:
    widths = [channels_in] + [channels_out] * config.num_res_blocks
    return nn.Sequential(
        *(ResBlock(a, b, config.norm_num_groups) for a, b in zip(widths, widths[1:], strict=False))
    )


class TemporalEncoder(nn.Module):
    """``[B 4 T H W]`` to the moments ``[B 8 T' H W]`` of the latents, T a multiple of 4."""

    def __init__(self, channels: int, config: OpenSoraVAEConfig) -> None:
        super().__init__()
        widths = [config.filters * multiplier for multiplier in config.channel_multipliers]
        self.conv_in = CausalConv3d(channels, config.filters, 3, bias=False)
        self.block_res_blocks = nn.ModuleList(
            _level(a, b, config) for a, b in zip([config.filters, *widths], widths, strict=False)
        )
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(width, width, 3, time_stride=2) if halved else nn.Identity()
            for width, halved in zip(widths, config.temporal_downsample, strict=False)
        )
        self.res_blocks = _level(widths[-1], widths[-1], config)
        self.norm1 = nn.GroupNorm(config.norm_num_groups, widths[-1])
        self.conv2 = CausalConv3d(widths[-1], 2 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for blocks, halve in zip(self.block_res_blocks, [*self.conv_blocks, nn.Identity()], strict=True):
            x = halve(blocks(x))
        return self.conv2(silu(self.norm1(self.res_blocks(x))))


class TemporalDecoder(nn.Module):
    """Latents ``[B 4 T' H W]`` to ``[B 4 4T' H W]``; levels have the encoder's numbers, and run in reverse order."""

    def __init__(self, channels: int, config: OpenSoraVAEConfig) -> None:
        super().__init__()
        widths = [config.filters * multiplier for multiplier in config.channel_multipliers]
        self.conv1 = CausalConv3d(channels, widths[-1], 3)
        self.res_blocks = _level(widths[-1], widths[-1], config)
        self.block_res_blocks = nn.ModuleList(
            _level(a, b, config) for a, b in zip([*widths[1:], widths[-1]], widths, strict=True)
        )
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(width, 2 * width, 3) if doubled else nn.Identity()
            for width, doubled in zip(widths[1:], config.temporal_downsample, strict=True)
        )
        self.norm1 = nn.GroupNorm(config.norm_num_groups, widths[0])
        self.conv_out = CausalConv3d(widths[0], channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.res_blocks(self.conv1(x))
        for level in reversed(range(len(self.block_res_blocks))):
            x = self.block_res_blocks[level](x)
            if level > 0 and not isinstance(self.conv_blocks[level - 1], nn.Identity):
                x = rearrange(self.conv_blocks[level - 1](x), "B (C two) T H W -> B C (T two) H W", two=2)
        return self.conv_out(silu(self.norm1(x)))


class TemporalVAE(nn.Module):
    """A VAE along time. Lengths that its stride does not divide are padded with zeros before the first frame."""

    def __init__(self, channels: int, config: OpenSoraVAEConfig) -> None:
        super().__init__()
        self.stride = 2 ** sum(config.temporal_downsample)
        self.encoder = TemporalEncoder(channels, config)
        self.quant_conv = CausalConv3d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = CausalConv3d(channels, channels, 1)
        self.decoder = TemporalDecoder(channels, config)

    def encode(self, x: Tensor) -> Tensor:
        """Return the mean of the posterior, ``[B 4 T H W] -> [B 4 T' H W]``."""
        filled = pad(x, (0, 0, 0, 0, -x.shape[2] % self.stride, 0))
        return self.quant_conv(self.encoder(filled)).chunk(2, dim=1)[0]

    def decode(self, z: Tensor, num_frames: int) -> Tensor:
        """Decode latents ``[B 4 T' H W]``, and return the last ``num_frames``."""
        x = self.decoder(self.post_quant_conv(z))
        return x[:, :, x.shape[2] - num_frames :]


class OpenSoraCodec(VideoCodec):
    """Latents ``[B 4 T' H/8 W/8]``: 5 frames for each chunk of 17, and n / 4, rounded up, for n frames at the end.

    Both VAEs give the mean of their posterior, where Open-Sora samples. Rows and columns beyond a multiple of 8,
    which Open-Sora's image VAE drops, are padded and decoded.
    """

    keeps_float32 = False
    name = "opensora"
    causal_first_frame = True
    size_multiple = 2  # as its models were trained; sizes that 8 does not divide are padded

    def __init__(self, config: OpenSoraVAEConfig) -> None:
        """Make a VAE with random weights."""
        super().__init__()
        self.settings = config
        self.channels = len(config.shift)
        levels = len(config.block_out_channels)
        self.stride = (2 ** sum(config.temporal_downsample), 2 ** (levels - 1), 2 ** (levels - 1))
        self.chunk = config.micro_frame_size
        self.latent_chunk = math.ceil(self.chunk / self.stride[0])
        vae = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * levels,
            up_block_types=["UpDecoderBlock2D"] * levels,
            block_out_channels=config.block_out_channels,
            layers_per_block=2,
            latent_channels=self.channels,
            norm_num_groups=config.norm_num_groups,
        )
        self.spatial_vae = nn.ModuleDict({"module": vae})
        self.temporal_vae = TemporalVAE(self.channels, config)
        # Not buffers, so that they stay in float32 when the VAE is moved to another precision.
        self.shift = torch.tensor(config.shift).view(-1, 1, 1, 1)  # [C 1 1 1]
        self.scale = torch.tensor(config.scale).view(-1, 1, 1, 1)
        self.eval().requires_grad_(False)

    @classmethod
    def from_config(cls, config: CodecConfig) -> Self:
        """Load the VAE at `config.path`: a folder with config.json and safetensors, or a hub id.

        Raises:
            UserError: no such folder or hub id, or weights that are pickled, damaged, or not exactly this VAE's.
        """
        source = locate_weights("codec.path", config.path, config.subfolder)
        with explain_load_errors("opensora", source):
            return cls._read(_local(source), DTYPES[config.dtype])

    @classmethod
    def load(cls, directory: Path, settings: dict[str, Any], dtype: torch.dtype | None) -> "OpenSoraCodec":
        source = locate_weights("the saved codec", str(directory), None)
        with explain_load_errors("opensora", source):
            return cls._read(directory, dtype or named_dtype(settings.get("dtype", "float32")))

    @classmethod
    def _read(cls, folder: Path, dtype: torch.dtype) -> Self:
        config = OpenSoraVAEConfig.read(read_json(folder / "config.json", "a VAE"))
        weights = read_weights(folder)
        # Open-Sora keeps shift and scale both here and in config.json.
        shift, scale = (weights.pop(name, None) for name in ("shift", "scale"))
        with torch.device("meta"):
            codec = cls(config)
        check_keys(weights, codec.state_dict())
        codec.load_state_dict({name: tensor.to(dtype) for name, tensor in weights.items()}, assign=True)
        codec.shift, codec.scale = (
            torch.tensor(given).view(-1, 1, 1, 1) if found is None else found.float().view(-1, 1, 1, 1)
            for given, found in ((config.shift, shift), (config.scale, scale))
        )
        return codec

    @property
    def cuts(self) -> Cuts:
        return Cuts(self.latent_chunk, self.chunk, exact=True)

    def saved_settings(self) -> dict[str, Any]:
        return {"dtype": dtype_name(self.dtype)}

    def fingerprint(self) -> str:
        numbers = {"shift": self.shift.flatten().tolist(), "scale": self.scale.flatten().tolist()}
        return self._hash(asdict(self.settings) | numbers)

    def save(self, directory: Path) -> None:
        """Write the files in the format of Open-Sora."""
        numbers = {"shift": self.shift[None].clone(), "scale": self.scale[None].clone()}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors | numbers, directory / "model.safetensors", metadata={"format": "pt"})
        write_json(
            directory / "config.json", {"model_type": "VideoAutoencoderPipeline"} | asdict(self.settings)
        )

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        whole, rest = divmod(num_frames, self.chunk)
        frames = whole * self.latent_chunk + math.ceil(rest / self.stride[0])
        return frames, math.ceil(height / self.stride[1]), math.ceil(width / self.stride[2])

    def pixel_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        whole, rest = divmod(num_frames, self.latent_chunk)
        return whole * self.chunk + rest * self.stride[0], height * self.stride[1], width * self.stride[2]

    def latent_index(self, frame: int, num_frames: int | None = None) -> int:
        chunk, within = divmod(frame, self.chunk)
        return chunk * self.latent_chunk + (within + self._padding(chunk, num_frames)) // self.stride[0]

    def start_frame(self, index: int, num_frames: int | None = None) -> int:
        chunk, within = divmod(index, self.latent_chunk)
        return chunk * self.chunk + max(0, within * self.stride[0] - self._padding(chunk, num_frames))

    def encoding_context(self, index: int, num_frames: int) -> tuple[int, int]:
        within = index % self.latent_chunk
        begin = self.start_frame(index - within, num_frames)
        return within, self.start_frame(index, num_frames) - begin

    def _padding(self, chunk: int, num_frames: int | None) -> int:
        """Return the padding before a chunk in frames; the last chunk of a video may be shorter than the others."""
        frames = self.chunk if num_frames is None else min(self.chunk, num_frames - chunk * self.chunk)
        return -frames % self.stride[0]

    def pad_video(self, video: Tensor) -> Tensor:
        """Pad rows and columns only: the temporal VAE pads frames by itself."""
        return super().pad_video(video)[:, :, : video.shape[2]]

    def _encode(self, video: Tensor) -> Tensor:
        vae: Any = self.spatial_vae["module"]
        images = encode_images(vae, video.to(self.dtype), IMAGES_PER_PASS) * self.settings.spatial_factor
        z = torch.cat([self.temporal_vae.encode(chunk) for chunk in images.split(self.chunk, dim=2)], dim=2)
        return (z.float() - self.shift.to(z.device)) / self.scale.to(z.device)

    def _decode_frames(self, latents: Tensor, num_frames: int) -> Tensor:
        """Decode; if ``num_frames`` end in the last chunk, its padding in front is cut off."""
        z = (latents * self.scale.to(latents.device) + self.shift.to(latents.device)).to(self.dtype)
        chunks = z.split(self.latent_chunk, dim=2)
        counts = [self.pixel_shape(chunk.shape[2], 1, 1)[0] for chunk in chunks]
        if self.latent_shape(num_frames, 1, 1)[0] == z.shape[2]:
            counts[-1] = num_frames - sum(counts[:-1])
        images = [self.temporal_vae.decode(*pair) for pair in zip(chunks, counts, strict=True)]
        frames = torch.cat(images, dim=2)[:, :, :num_frames] / self.settings.spatial_factor
        vae: Any = self.spatial_vae["module"]
        return decode_images(vae, frames, IMAGES_PER_PASS)


def _local(source: WeightsSource) -> Path:
    """Return the folder of a source, downloaded from the hub if it is not local."""
    if source.local:
        return Path(source.location)
    from huggingface_hub import snapshot_download

    inside = f"{source.subfolder}/" if source.subfolder else ""
    folder = snapshot_download(
        source.location, allow_patterns=[f"{inside}config.json", f"{inside}*.safetensors"]
    )
    return Path(folder) / inside
