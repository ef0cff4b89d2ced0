"""Slicing and tiling, as users of diffusers know them, through our codecs."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from stdit.codecs import CodecConfig, build_codec
from stdit.codecs.base import VideoCodec
from stdit.codecs.diffusers_vae import DiffusersCodec
from stdit.codecs.pixel import PixelCodec
from stdit.errors import UserError
from tests.codecs.tiny import TINY_VAES, save_tiny_vae, tiny_opensora_vae

every_vae = pytest.mark.parametrize("name", TINY_VAES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save_tiny_vae(name, tmp_path_factory.mktemp(name)) for name in TINY_VAES}


def build(name: str, folders: dict[str, Path]) -> DiffusersCodec:
    codec = build_codec(CodecConfig(name=name, path=str(folders[name])))
    assert isinstance(codec, DiffusersCodec)
    return codec


def smooth_video(batch: int, *size: int) -> Tensor:
    coarse = torch.rand(batch, 3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return interpolate(coarse, size=size, mode="trilinear") * 2 - 1


def forward_calls(module: nn.Module) -> list[int]:
    """A list that grows with each call of a module."""
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("name", [*TINY_VAES, "opensora", "tiny", "pixel"])
def test_slices_are_the_videos_alone(name: str, folders: dict[str, Path]) -> None:
    codec: VideoCodec
    if name == "opensora":
        codec = tiny_opensora_vae()
    elif name in TINY_VAES:
        codec = build(name, folders)
    else:
        codec = build_codec(CodecConfig(name=name))
    video = smooth_video(2, 5, 32, 32)
    latents = torch.cat([codec.encode(one) for one in video.split(1)])
    pixels = torch.cat([codec.decode(one, 5, 30, 31) for one in latents.split(1)])
    codec.enable_slicing()
    assert torch.equal(codec.encode(video), latents)
    assert torch.equal(codec.decode(latents, 5, 30, 31), pixels)
    codec.disable_slicing()
    torch.testing.assert_close(codec.encode(video), latents, atol=1e-4, rtol=1e-4)


@every_vae
def test_slices_of_the_vae_itself(name: str, folders: dict[str, Path]) -> None:
    """They are videos alone; those of an image VAE are frames alone."""
    codec = build(name, folders)
    video = smooth_video(2, 5, 32, 32)
    length = 1 if name == "AutoencoderKL" else 5
    alone = [
        torch.cat([codec.encode(part) for part in video.split(1)]) for video in video.split(length, dim=2)
    ]
    latents = torch.cat(alone, dim=2)
    codec.vae.enable_slicing()
    assert torch.equal(codec.encode(video), latents)
    decoded = codec.decode(latents[:1])
    codec.vae.disable_slicing()
    torch.testing.assert_close(codec.decode(latents[:1]), decoded, atol=1e-4, rtol=1e-4)


@every_vae
def test_tiles_are_blended(name: str, folders: dict[str, Path]) -> None:
    """Near to whole frames and without seams, in VAEs in which no layer sees the whole frame."""
    codec = build(name, folders)
    for path, module in codec.vae.named_modules():
        if isinstance(module, nn.GroupNorm):
            module.forward = nn.Identity().forward  # type: ignore[method-assign]
        elif path.endswith(("to_out.0", "attentions.0.proj")):
            nn.init.zeros_(module.weight)  # type: ignore[arg-type]
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    frames, rows, _ = codec.stride
    count = 60 if name == "AutoencoderKL" else 12 if rows == 32 else 18
    video = smooth_video(1, 1 + frames, count * rows, count * rows)
    latents = codec.encode(video)
    pixels = codec.decode(latents)
    calls = forward_calls(codec.vae.decoder)
    enable_small_tiles(codec, count * 2 // 3 * rows)
    found = codec.decode(latents)
    assert len(calls) >= 4 and found.shape == pixels.shape
    assert relative(codec.encode(video), latents) < 0.2
    if name != "AutoencoderKLLTXVideo":  # its decoder adds noise, to each tile another
        assert relative(found, pixels) < 0.2
        assert largest_step(found) < 1.05 * largest_step(pixels) + 1e-4
    codec.disable_tiling()
    assert torch.equal(codec.decode(latents), pixels)


def enable_small_tiles(codec: DiffusersCodec, size: int) -> None:
    """Let the VAE work in tiles of this many pixels, which overlap by a quarter."""
    options: dict[str, Any] = {"tile_sample_min_height": size, "tile_sample_min_width": size}
    options |= {"tile_sample_stride_height": size * 3 // 4, "tile_sample_stride_width": size * 3 // 4}
    known = inspect.signature(codec.vae.enable_tiling).parameters
    codec.enable_tiling(**{key: value for key, value in options.items() if key in known})
    if not known:
        codec.vae.tile_sample_min_size = size
        codec.vae.tile_latent_min_size = size // codec.stride[1]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def largest_step(video: Tensor) -> float:
    """The largest difference between pixels that are beside each other in a row."""
    return float(video.diff(dim=-1).abs().max())


def test_opensoras_image_vae_works_in_tiles() -> None:
    codec = tiny_opensora_vae()
    vae: Any = codec.spatial_vae["module"]
    assert vae.tile_sample_min_size == 512
    vae.tile_sample_min_size, vae.tile_latent_min_size = 32, 16
    video = smooth_video(1, 5, 48, 40)
    latents = codec.encode(video)
    pixels = codec.decode(latents, 5)
    calls = forward_calls(vae.decoder)
    codec.enable_tiling()
    found = codec.decode(latents, 5)
    assert found.shape == pixels.shape and not torch.equal(found, pixels) and len(calls) > 4
    assert codec.encode(video).shape == latents.shape
    codec.disable_tiling()
    assert torch.equal(codec.decode(latents, 5), pixels)


def test_a_codec_without_tiles_says_so() -> None:
    codec = PixelCodec()
    with pytest.raises(
        UserError, match="codec pixel: cannot work in tiles, and needs little memory as it is"
    ):
        codec.enable_tiling()
    codec.disable_tiling()
