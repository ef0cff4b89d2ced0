"""The memory that decoding in tiles takes, against what is stated, and what is said if there is too little."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from stdit.codecs import CodecConfig, build_codec
from stdit.codecs.base import VideoCodec
from stdit.codecs.diffusers_vae import DiffusersCodec
from stdit.codecs.opensora_vae import OpenSoraCodec, OpenSoraVAEConfig
from stdit.codecs.tiling import tiled_bytes
from stdit.errors import UserError

MIB = 2**20
NARROW: dict[str, dict[str, Any]] = {
    "AutoencoderKL": dict(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[32] * 4,
    ),
    "AutoencoderKLCogVideoX": dict(block_out_channels=[32] * 4, layers_per_block=1),
    "AutoencoderKLHunyuanVideo": dict(block_out_channels=[32] * 4, layers_per_block=1),
    "AutoencoderKLLTXVideo": dict(
        latent_channels=32,
        block_out_channels=[64] * 4,
        decoder_block_out_channels=[128] * 4,
        layers_per_block=[1] * 5,
        decoder_layers_per_block=[1] * 5,
    ),
    "AutoencoderKLWan": dict(base_dim=16),
    "opensora": dict(block_out_channels=(64, 64, 64, 64), filters=32, num_res_blocks=1),
    "tiny": {},
}
"""VAEs of the released kinds, but narrower."""
TILES = {"tiny": ((49, 320, 320), (32, 192, 192))}
"""Sizes of videos and tiles, so that the memory is much more than what a process takes besides."""
PROGRAM = """
import sys, torch
from stdit.codecs.tiling import tiled_bytes
from tests.codecs.test_decoding_memory import peak_resident
from tests.codecs.test_tiling_memory import TILES, narrow_codec

codec = narrow_codec(sys.argv[1])
size, tile = TILES.get(sys.argv[1], ((37, 136, 136), (32, 128, 128)))
codec.enable_tiling(tile)
latents = torch.randn(1, codec.channels, *codec.latent_shape(*size))
plan = codec.tile_plan(latents.shape[2:], *size)
codec.decode(torch.randn(1, codec.channels, *codec.latent_shape(1, 32, 32)))  # libraries are loaded, and more
print(*plan.counts, tiled_bytes(codec, plan), peak_resident(lambda: codec.decode(latents, *size)))
"""


def narrow_codec(name: str) -> VideoCodec:
    import diffusers

    if name == "tiny":
        return build_codec(CodecConfig(name=name))
    if name == "opensora":
        return OpenSoraCodec(OpenSoraVAEConfig(**NARROW[name]))
    return DiffusersCodec(getattr(diffusers, name)(**NARROW[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", NARROW)
def test_the_peak_of_a_process_is_as_stated(name: str) -> None:
    command = [sys.executable, "-c", PROGRAM, name]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory goes back at once
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    *counts, stated, peak = map(int, done.stdout.split())
    assert counts == [3 if name == "opensora" else 2, 2, 2]
    assert stated == pytest.approx(peak, rel=0.15)


def tiny() -> tuple[VideoCodec, tuple[int, int, int]]:
    codec = build_codec(CodecConfig(name="tiny"))
    return codec, codec.latent_shape(49, 400, 320)


def test_auto_takes_the_largest_tiles_that_fit() -> None:
    codec, shape = tiny()
    whole = codec.decoding_bytes(shape)
    works = []
    for share in (1.0, 0.6, 0.4, 0.3):
        codec.enable_tiling("auto", int(share * whole))
        plan = codec.tile_plan(shape)
        assert plan.whole == (share == 1)
        assert tiled_bytes(codec, plan) <= share * whole
        works.append(plan.work)
    assert works == sorted(works) and works[-1] > works[0]


def test_as_many_frames_as_fit() -> None:
    codec, shape = tiny()
    needs = []
    for memory in (2**40, 180 * MIB, 130 * MIB):
        codec.enable_tiling(192, memory)
        plan = codec.tile_plan(shape)
        assert plan.pixel_shape[1:] == (176, 192)
        needs.append(plan.counts[0])
    assert needs[0] == 1 < needs[1] < needs[2]


@pytest.mark.parametrize(
    "tile, memory, message",
    [
        (
            384,
            100,
            r"codec.tile = 384: to decode 49 x 400 x 320 .* in tiles of 5 x 232 x 320 needs 0.118 .* use 192, which",
        ),
        (
            (49, 384, 320),
            150,
            r"codec.tile = \[49, 384, 320\]: .* needs 0.381 .* 0.146 GiB is free: use 384, which fits, or auto",
        ),
        (128, 50, r"codec.tile = 128: .* 0.0488 GiB is free: no smaller tile fits, either: free memory"),
        ("auto", 50, r"codec.tile = auto: .* in tiles of 5 x 120 x 128 needs .* no smaller tile fits"),
        ("auto", -5, r"codec.tile = auto: .* and 0 GiB is free: no smaller tile fits, either"),
    ],
)
def test_too_little_memory_for_a_tile(tile: Any, memory: int, message: str) -> None:
    codec, shape = tiny()
    codec.enable_tiling(tile, memory * MIB)
    with pytest.raises(UserError, match=message):
        codec.decode(torch.zeros(1, codec.channels, *shape))
