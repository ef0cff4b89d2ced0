"""Slicing and tiling: our tiles, in every codec, and those of diffusers' VAEs, which stay as diffusers has them."""

import inspect
from collections.abc import Sequence
from itertools import pairwise, product
from math import ceil
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
from stdit.codecs.tiling import Interval, Part, cut, intervals, ramps
from stdit.errors import UserError
from stdit.pipelines.config import SampleConfig
from stdit.settings import parse
from stdit.training.config import TrainConfig
from tests.codecs.tiny import TINY_VAES, save_tiny_vae, tiny_opensora_vae

CODECS = [*TINY_VAES, "opensora", "tiny", "pixel", "pca"]
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
def test_tiles_of_the_vae_itself(name: str, folders: dict[str, Path]) -> None:
    """Near to whole frames and without seams, in VAEs in which no layer sees the whole frame."""
    codec = build(name, folders)
    remove_what_sees_all(codec)
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
    codec.vae.disable_tiling()
    assert torch.equal(codec.decode(latents), pixels)


def remove_what_sees_all(codec: DiffusersCodec) -> None:
    """Let no layer of a VAE see the whole frame."""
    for path, module in codec.vae.named_modules():
        if isinstance(module, nn.GroupNorm):
            module.forward = nn.Identity().forward  # type: ignore[method-assign]
        elif path.endswith(("to_out.0", "attentions.0.proj")):
            nn.init.zeros_(module.weight)  # type: ignore[arg-type]
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]


def enable_small_tiles(codec: DiffusersCodec, size: int) -> None:
    """Let the VAE work in tiles of this many pixels, which overlap by a quarter."""
    options: dict[str, Any] = {"tile_sample_min_height": size, "tile_sample_min_width": size}
    options |= {"tile_sample_stride_height": size * 3 // 4, "tile_sample_stride_width": size * 3 // 4}
    known = inspect.signature(codec.vae.enable_tiling).parameters
    codec.vae.enable_tiling(**{key: value for key, value in options.items() if key in known})
    if not known:
        codec.vae.tile_sample_min_size = size
        codec.vae.tile_latent_min_size = size // codec.stride[1]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def largest_step(video: Tensor) -> float:
    """The largest difference between pixels that are beside each other in a row."""
    return float(video.diff(dim=-1).abs().max())


# ---- our tiles ----

SIZE = (37, 136, 136)
TILE = (32, 128, 128)


def any_codec(name: str, folders: dict[str, Path]) -> VideoCodec:
    if name == "opensora":
        return tiny_opensora_vae()
    if name == "pca":
        codec = build_codec(CodecConfig(name=name, stride=(2, 4, 4), channels=12))
        codec.fit(torch.rand(3, 8, 32, 32, generator=torch.Generator().manual_seed(k)) for k in range(8))
        return codec
    return build(name, folders) if name in TINY_VAES else build_codec(CodecConfig(name=name))


def random_latents(codec: VideoCodec, *size: int) -> Tensor:
    shape = codec.latent_shape(*size)
    return torch.randn(1, codec.channels, *shape, generator=torch.Generator().manual_seed(0)) / 3


def levels(found: Tensor, expected: Tensor) -> float:
    """The largest difference in levels of 255."""
    return float((found - expected).abs().max() * 127.5)


def triangle(parts: Sequence[Part], length: int) -> Tensor:
    """Weights of the parts ``[parts, length]``, made one place after the other."""
    weights = torch.zeros(len(parts), length, dtype=torch.float64)
    for one, part in enumerate(parts):
        for place in range(*part.pixels):
            others = [
                other.pixels
                for other in (*parts[:one][-1:], *parts[one + 1 :][:1])
                if place in range(*other.pixels)
            ]
            weights[one, place] = 1
            for start, stop in others:
                before = start < part.pixels.start
                shared = stop - part.pixels.start if before else part.pixels.stop - start
                distance = place - part.pixels.start if before else part.pixels.stop - 1 - place
                weights[one, place] = min(weights[one, place], (distance + 0.5) / shared)
    return (weights / weights.sum(0)).float()


@pytest.mark.parametrize("length, size, overlap", product((1, 7, 64, 91), (2, 9, 40), (0, 1, 4)))
def test_spans_cover_an_axis(length: int, size: int, overlap: int) -> None:
    if overlap >= size:
        return
    spans = intervals(length, size, overlap)
    assert spans[0].start == 0 and spans[-1].stop == length and max(map(len, spans)) <= size
    assert all(one.stop - two.start >= overlap for one, two in pairwise(spans))
    assert len(spans) == 1 or len(spans) == ceil((length - overlap) / (size - overlap))
    total = torch.zeros(length)
    for span, weight in zip(spans, ramps(spans), strict=True):
        assert (weight > 0).all()
        total[span.start : span.stop] += weight
    torch.testing.assert_close(total, torch.ones(length))


SLOW = ("AutoencoderKLHunyuanVideo", "AutoencoderKLCogVideoX")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CODECS]
)
def test_tiles_equal_a_reference_and_have_no_seams(name: str, folders: dict[str, Path]) -> None:
    """Each tile is decoded alone, and blended by weights that are made in another way.

    The largest jump where a tile begins or ends is at most 1.2 times that elsewhere, along each axis.
    """
    codec = any_codec(name, folders)
    latents = interpolate(random_latents(codec, 17, 40, 40), codec.latent_shape(*SIZE), mode="trilinear")
    codec.enable_tiling(TILE)
    plan, found = codec.tile_plan(latents.shape[2:], *SIZE), codec.decode(latents, *SIZE)
    assert min(plan.counts) > 1
    for axis, parts in enumerate(plan.axes, 2):
        jumps = found.diff(dim=axis).abs().amax([one for one in range(5) if one != axis])
        ends = [part.pixels.start - 1 for part in parts[1:]] + [part.pixels.stop - 1 for part in parts[:-1]]
        elsewhere = [place for place in range(len(jumps)) if place not in ends]
        assert jumps[ends].max() <= 1.2 * jumps[elsewhere].max(), (axis, jumps)
    if name == "AutoencoderKLWan":  # whose tiles begin where each latent has seen its whole frame: see below
        return
    codec.disable_tiling()
    times = plan.time
    if codec.cuts.streams:
        times = (Part(Interval(0, latents.shape[2]), Interval(0, SIZE[0])),)
    weights = [triangle(parts, size) for parts, size in zip((times, *plan.axes[1:]), SIZE, strict=True)]
    expected = torch.zeros_like(found)
    for (i, t), (j, h), (k, w) in product(*map(enumerate, (times, *plan.axes[1:]))):
        pixels = codec.decode(cut(latents, (t.latents, h.latents, w.latents)), t.context + len(t.pixels))
        place = cut(expected, (t.pixels, h.pixels, w.pixels))
        of_t, of_h, of_w = (
            weight[row, slice(*part.pixels)]
            for weight, row, part in zip(weights, (i, j, k), (t, h, w), strict=True)
        )
        place += pixels[:, :, t.context :, : len(of_h), : len(of_w)] * (
            of_t[:, None, None] * of_h[:, None] * of_w
        )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_wans_tiles_equal_the_whole(folders: dict[str, Path]) -> None:
    """Away from where tiles overlap, within 2 levels of 255; its attention sees whole frames, as it does without."""
    codec, size = build("AutoencoderKLWan", folders), (45, 200, 170)
    latents = 3 * random_latents(codec, *size)
    whole = codec.decode(latents, *size)
    codec.enable_tiling(TILE)
    plan, found = codec.tile_plan(latents.shape[2:], *size), codec.decode(latents, *size)
    assert plan.counts == (2, 3, 2)
    alone = [(triangle(parts, length) == 1).any(0) for parts, length in zip(plan.axes, size, strict=True)]
    assert [int(one.sum()) for one in alone] == [45, 88, 106]
    t, h, w = alone
    away = t[:, None, None] & h[:, None] & w
    assert levels(found[..., away], whole[..., away]) < 2
    assert (
        whole.std() > 0.1 and levels(found, whole) > 2
    )  # the weights are random, so that seams are not exact


@pytest.mark.parametrize("name", CODECS)
def test_cuts_in_time_that_change_nothing(name: str, folders: dict[str, Path]) -> None:
    codec = any_codec(name, folders)
    if not (codec.cuts.exact or codec.cuts.streams):
        assert name in ("AutoencoderKLHunyuanVideo", "AutoencoderKLLTXVideo")
        return
    for frames in (41, 45):
        latents = random_latents(codec, frames, 40, 35)
        whole = codec.decode(latents, frames, 40, 35)
        codec.enable_tiling((32, 128, 128))
        plan = codec.tile_plan(latents.shape[2:], frames, 40, 35)
        assert plan.counts[0] > 1 and plan.counts[1:] == (1, 1)
        torch.testing.assert_close(codec.decode(latents, frames, 40, 35), whole, atol=1e-5, rtol=1e-5)
        codec.disable_tiling()


@pytest.mark.parametrize("name", CODECS)
def test_tiles_larger_than_the_video(name: str, folders: dict[str, Path]) -> None:
    codec = any_codec(name, folders)
    for size in ((1, 40, 35), (9, 40, 35)):
        latents = random_latents(codec, *size)
        whole = codec.decode(latents, *size)
        for tile in (128, (32, 128, 128)):
            codec.enable_tiling(tile)
            assert codec.tile_plan(latents.shape[2:], *size).whole
            assert torch.equal(codec.decode(latents, *size), whole)
        codec.disable_tiling()


@pytest.mark.parametrize("name", CODECS)
def test_encoding_in_tiles(name: str, folders: dict[str, Path]) -> None:
    """Near to whole frames, unless norms see all of them; ``auto`` encodes whole ones."""
    codec = any_codec(name, folders)
    if name in TINY_VAES:
        remove_what_sees_all(codec)  # type: ignore[arg-type]
    frames = 1 if name == "AutoencoderKLHunyuanVideo" else 5
    video = smooth_video(1, frames, 200, 170)
    latents, fingerprint = codec.encode(video), codec.encoding_fingerprint()
    codec.enable_tiling(128)
    found = codec.encode(video)
    assert found.shape == latents.shape and codec.encoding_fingerprint() != fingerprint
    assert relative(found, latents) < (0.5 if name in ("tiny", "opensora") else 0.3)
    assert (relative(found, latents) < 1e-5) == (name in ("pixel", "pca"))
    codec.enable_tiling("auto")
    assert torch.equal(codec.encode(video), latents) and codec.encoding_fingerprint() == fingerprint


def test_no_tile_is_smaller_than_its_overlaps() -> None:
    codec = PixelCodec()
    with pytest.raises(UserError, match="codec.tile = 127: .* share 64 pixels.* use at least 128 instead of"):
        codec.enable_tiling(127)
    with pytest.raises(
        UserError, match=r"codec.tile = \[31, 128, 128\]: .*16 frames.* 32 instead of 31, or auto"
    ):
        CodecConfig(tile=(31, 128, 128))
    with pytest.raises(UserError, match=r"codec.tile = \[32, 128, 0\]: .* use at least 128 instead of 0"):
        codec.enable_tiling((32, 128, 0))


@pytest.mark.parametrize("config", [SampleConfig, TrainConfig])
def test_tiles_on_the_command_line(config: Any) -> None:
    assert parse(config, []).codec.tile == "auto"
    assert parse(config, ["--codec.tile", "256"]).codec.tile == 256
    assert parse(config, ["--codec.tile", "[33, 256, 128]"]).codec.tile == (33, 256, 128)
    for given, message in {
        "100": "codec.tile = 100: neighbouring tiles share 64 pixels, .* use at least 128 instead of 100",
        "[8, 256, 256]": r"codec.tile = \[8, 256, 256\]: neighbouring tiles share 16 frames",
        "big": "codec.tile",
        "[256, 256]": "codec.tile",
    }.items():
        with pytest.raises(UserError, match=message):
            parse(config, ["--codec.tile", given])
