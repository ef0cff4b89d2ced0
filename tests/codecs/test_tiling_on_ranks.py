"""Tiles that several ranks decode, against those of one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stdit.codecs import CodecConfig, base, build_codec
from stdit.codecs.base import VideoCodec
from stdit.codecs.tiling import MOST_BYTES_PER_PIXEL, Ranks
from stdit.parallel.config import SamplingParallelConfig
from stdit.parallel.processes.mesh import build_mesh
from stdit.parallel.sequence.group import Group
from tests.codecs.tiny import TINY_VAES, save_tiny_vae, tiny_opensora_vae
from tests.parallel.ranks import run_on_ranks

SIZES = {
    "AutoencoderKLWan": (5, 140, 130),
    "AutoencoderKLLTXVideo": (37, 140, 130),
    "opensora": (2, 140, 130),
    "tiny": (37, 140, 130),
    "pixel": (37, 140, 130),
}
TILE = (32, 128, 128)


def codec_of(name: str, folder: Path) -> VideoCodec:
    if name == "opensora":
        return tiny_opensora_vae()
    path = str(folder / name) if name in TINY_VAES else None
    return build_codec(CodecConfig(name=name, path=path))


def ranks_of(sp: int, cfg: int) -> Ranks:
    mesh = build_mesh(SamplingParallelConfig(sp=sp, cfg=cfg), torch.device("cpu"))
    return Ranks(mesh.sp, mesh.cfg)


def compare(group: Group, sp: int, cfg: int, folder: Path) -> None:
    """Decode with all ranks, and then alone: the same bits, and all ranks have had work."""
    ranks = ranks_of(sp, cfg)
    assert (ranks.size, ranks.rank) == (group.size, group.rank)
    for name, size in SIZES.items():
        codec = codec_of(name, folder)
        codec.enable_tiling(TILE)
        shape = (1, codec.channels, *codec.latent_shape(*size))
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)) / 3
        counts = []
        decode_parts = codec._decode_parts

        def count(parts: Any, ends: Any, decode_parts: Any = decode_parts, counts: Any = counts) -> Any:
            counts.append(len(ends))
            return decode_parts(parts, ends)

        codec._decode_parts = count  # type: ignore[method-assign]
        found = codec.decode(latents, *size, ranks=ranks)
        shared = sum(counts)
        counts.clear()
        assert torch.equal(found, codec.decode(latents, *size)), name
        assert 0 < shared < sum(counts) and len(counts) >= 4, (name, shared, counts)


@pytest.mark.parametrize(
    "sp, cfg",
    [
        pytest.param(2, 1, marks=pytest.mark.slow),
        (4, 1),
        *(pytest.param(*grid, marks=pytest.mark.slow) for grid in ((2, 2), (3, 1))),
    ],
)
def test_ranks_decode_the_bits_of_one_process(sp: int, cfg: int, tmp_path: Path) -> None:
    for name in TINY_VAES.keys() & SIZES:
        save_tiny_vae(name, tmp_path / name)
    run_on_ranks(sp * cfg, compare, sp, cfg, tmp_path)


def check_agreement(group: Group) -> None:
    codec, ranks = build_codec(CodecConfig(name="tiny")), ranks_of(2, 1)
    least = MOST_BYTES_PER_PIXEL * 45 * 200 * 200  # that it is decoded whole without an estimate
    base.free_memory = lambda device: (least, 2**26)[group.rank]  # type: ignore[assignment]
    shape = codec.latent_shape(45, 200, 200)
    assert codec.tile_plan(shape).whole == (group.rank == 0), "alone"
    plan = codec.tile_plan(shape, ranks=ranks)
    assert not plan.whole
    codec.enable_tiling("auto", 2**26)
    assert codec.tile_plan(shape) == plan


def test_ranks_agree_on_the_least_memory() -> None:
    run_on_ranks(2, check_agreement)


def fail_on_one(group: Group) -> None:
    codec, ranks = build_codec(CodecConfig(name="pixel")), ranks_of(2, 1)
    codec.enable_tiling(128, 0)
    with pytest.raises(Exception, match="no smaller tile fits"):
        codec.decode(torch.zeros(1, 3, 1, 200, 200), ranks=ranks)


def test_all_ranks_refuse_what_does_not_fit() -> None:
    run_on_ranks(2, fail_on_one)


def test_a_batch_of_slices(tmp_path: Path) -> None:
    codec = build_codec(CodecConfig(name="tiny", tile=128))
    latents: Tensor = torch.randn(2, codec.channels, *codec.latent_shape(5, 140, 130))
    whole = codec.decode(latents, 5, 140, 130)
    codec.enable_slicing()
    torch.testing.assert_close(codec.decode(latents, 5, 140, 130), whole, atol=1e-5, rtol=1e-5)
