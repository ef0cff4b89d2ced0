"""The memory that decoding takes, against that of real tensors and of real processes."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import apply_group_offloading
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from stdit.codecs import CodecConfig, build_codec
from stdit.codecs.base import VideoCodec
from stdit.codecs.diffusers_vae import DiffusersCodec
from stdit.codecs.memory import StorageCounter, convolution_workspace, decoding_bytes
from stdit.codecs.opensora_vae import OpenSoraCodec, OpenSoraVAEConfig
from stdit.codecs.pca import PCACodec
from tests.codecs.tiny import TINY_VAES, tiny_opensora_vae

CPU = torch.device("cpu")
MIB = 2**20
EVERY_CODEC = [*TINY_VAES, "opensora", "tiny", "pixel", "pca"]
every_codec = pytest.mark.parametrize("name", EVERY_CODEC)


def codec_of(name: str) -> VideoCodec:
    torch.manual_seed(0)
    if name in TINY_VAES:
        return DiffusersCodec(getattr(diffusers, name)(**TINY_VAES[name]))
    if name == "pca":
        codec = PCACodec((2, 4, 4), channels=8)
        codec.fit([torch.rand(3, 4, 16, 16) * 2 - 1])
        return codec
    return tiny_opensora_vae() if name == "opensora" else build_codec(CodecConfig(name=name))


def counted(codec: VideoCodec, latents: torch.Tensor) -> int:
    """Peak bytes of decoding real latents, counted operation by operation."""
    weights = [*codec.parameters(), *codec.buffers()]
    with torch.no_grad(), StorageCounter(weights) as counter:
        latents = latents.clone()
        video = codec._decode_frames(latents, codec.pixel_shape(*latents.shape[2:])[0])
        video = video.float().clamp(-1, 1)
    return counter.peak


@every_codec
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_counts_what_real_tensors_take(name: str, dtype: torch.dtype) -> None:
    codec = codec_of(name).to(dtype)
    shape = codec.latent_shape(9, 64, 96)
    latents = torch.randn(2, codec.channels, *shape)
    video = codec.decode(latents)
    stated = decoding_bytes(codec, shape, 2)
    assert stated == pytest.approx(counted(codec, latents), rel=0.01)
    assert stated > video.nbytes
    assert torch.equal(codec.decode(latents), video), "nothing of the codec has changed"
    tensors = [one for part in codec.modules() for one in vars(part).values()]
    assert not any(isinstance(one, FakeTensor) for one in tensors)


@every_codec
def test_memory_grows_with_size_and_batch(name: str) -> None:
    codec = codec_of(name)
    frames, height, width = codec.latent_shape(9, 1024, 1024)  # small ones take more, without oneDNN
    sizes = [(frames, height, width), (frames, 2 * height, width), (frames, 2 * height, 2 * width)]
    needs = [
        decoding_bytes(codec, size, 2) for size in sizes
    ]  # a single small input is convolved in another way
    assert needs[0] < needs[1] < needs[2]
    assert needs[0] < decoding_bytes(codec, sizes[0], 4) <= 2.1 * needs[0]


@pytest.mark.parametrize("name", [*TINY_VAES, "opensora"])
def test_weights_may_be_on_the_meta_device(name: str) -> None:
    codec = codec_of(name)
    shape = codec.latent_shape(5, 32, 32)
    needed = decoding_bytes(codec, shape)
    assert decoding_bytes(codec.to("meta"), shape) == needed


@pytest.mark.parametrize("name", ["AutoencoderKLWan", "AutoencoderKL", "opensora"])
@pytest.mark.parametrize("kind", ["accelerate", "leaf_level", "block_level"])
def test_weights_may_be_offloaded(name: str, kind: str) -> None:
    codec: Any = codec_of(name)
    shape = codec.latent_shape(5, 32, 32)
    latents = torch.randn(1, codec.channels, *shape)
    video, needed = codec.decode(latents), decoding_bytes(codec, shape)
    if kind == "accelerate":
        cpu_offload(codec, CPU)
    else:
        options = {} if kind == "leaf_level" else {"num_blocks_per_group": 1}
        apply_group_offloading(codec, onload_device=CPU, offload_type=kind, **options)
    assert decoding_bytes(codec, shape) == needed
    assert torch.equal(codec.decode(latents), video)


def test_a_released_encoder_is_not_fetched() -> None:
    codec = codec_of("AutoencoderKL")
    needed = decoding_bytes(codec, (1, 8, 8))
    codec.release_encoder(lambda: pytest.fail("it was loaded again"))
    assert decoding_bytes(codec, (1, 8, 8)) == needed


def test_views_and_weights_do_not_count() -> None:
    layer = nn.Linear(4, 8)
    with torch.no_grad(), StorageCounter(layer.parameters()) as counter:
        view = layer.weight.t()[:2].flatten(0).view(-1)[:4]  # flatten copies
        assert counter.bytes == 2 * 8 * 4
        del view
        assert counter.bytes == 0
        layer.weight.t()
    assert counter.peak == 2 * 8 * 4


def test_a_small_convolution_copies_the_values_below_each_output() -> None:
    """PyTorch computes it without oneDNN; measured with narrow VAEs in tests/codecs/test_tiling_memory.py."""
    x, weight, out = torch.empty(1, 4, 6, 20, 20), torch.empty(8, 4, 3, 3, 3), torch.empty(1, 8, 4, 18, 18)
    assert convolution_workspace(x, weight, out) == 4 * 3**3 * (4 * 18 * 18) * 4
    large = torch.empty(1, 64, 6, 60, 20)
    assert convolution_workspace(large, torch.empty(64, 64, 3, 3, 3), large) < 3 * large.nbytes


WIDE: dict[str, dict[str, Any]] = {
    "AutoencoderKL": dict(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[64, 128, 128],
    ),
    "AutoencoderKLCogVideoX": dict(block_out_channels=[64, 128, 128, 128], layers_per_block=1),
    "AutoencoderKLHunyuanVideo": dict(block_out_channels=[64, 128, 128, 128], layers_per_block=1),
    "AutoencoderKLLTXVideo": {},
    "AutoencoderKLWan": dict(base_dim=48),
    "opensora": {},
}
"""VAEs that are narrower than the released ones, or as these."""
PROGRAM = """
import sys, torch
from stdit.codecs.memory import decoding_bytes
from tests.codecs.test_decoding_memory import peak_resident, wide_codec

name, dtype, *shape = sys.argv[1:]
shape = tuple(map(int, shape))
codec = wide_codec(name).to(getattr(torch, dtype))
stated = decoding_bytes(codec, shape)
latents = torch.randn(1, codec.channels, *shape)
codec.decode(torch.randn(1, codec.channels, *codec.latent_shape(1, 32, 32)))  # libraries are loaded, and more
print(stated, peak_resident(lambda: codec.decode(latents)))
"""


def wide_codec(name: str) -> VideoCodec:
    if name == "opensora":
        return OpenSoraCodec(OpenSoraVAEConfig(**WIDE[name]))
    return DiffusersCodec(getattr(diffusers, name)(**WIDE[name]))


def peak_resident(call: Any) -> int:
    """The most bytes by which the resident memory of this process grows in a call."""

    def resident(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, shape",
    [
        ("AutoencoderKL", (1, 64, 96)),
        ("AutoencoderKL", (5, 48, 48)),
        ("AutoencoderKLCogVideoX", (3, 24, 24)),
        ("AutoencoderKLCogVideoX", (5, 16, 32)),
        ("AutoencoderKLHunyuanVideo", (3, 24, 32)),
        ("AutoencoderKLHunyuanVideo", (6, 16, 24)),
        ("AutoencoderKLLTXVideo", (3, 10, 10)),
        ("AutoencoderKLLTXVideo", (5, 8, 16)),
        ("AutoencoderKLWan", (3, 24, 32)),
        ("AutoencoderKLWan", (7, 16, 24)),
        ("opensora", (5, 16, 16)),
        ("opensora", (7, 16, 24)),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_peak_of_a_process_is_as_stated(name: str, shape: tuple[int, ...], dtype: str) -> None:
    command = [sys.executable, "-c", PROGRAM, name, dtype, *map(str, shape)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory goes back at once
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    stated, peak = map(int, done.stdout.split())
    assert peak > 60 * MIB
    assert stated == pytest.approx(peak, rel=0.15)
