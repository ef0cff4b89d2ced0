"""Offloading and casting: the same video as without."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.hooks import apply_group_offloading
from torch import Tensor

from stdit.codecs import CodecConfig, build_codec
from stdit.pipelines.pipeline import STDiTPipeline
from tests.codecs.tiny import save_tiny_vae
from tests.pipelines.tiny import tiny_pipeline

CPU = torch.device("cpu")


def video(pipe: STDiTPipeline) -> Tensor:
    """A video with a conditioning frame, which uses the codec both ways."""
    picture = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    found: Tensor = pipe(
        "a red circle",
        image=picture,
        num_frames=9,
        height=16,
        width=16,
        generator=torch.Generator().manual_seed(1),
        output_type="pt",
    ).frames
    return found.cpu()


def codec(name: str, folder: Path) -> Any:
    if name == "tiny":
        return build_codec(CodecConfig(name="tiny"))
    return build_codec(CodecConfig(name=name, path=str(save_tiny_vae(name, folder / "vae"))))


@pytest.mark.parametrize("name", ["tiny", "AutoencoderKLWan"])
@pytest.mark.parametrize(
    "options", [dict(offload_type="leaf_level"), dict(offload_type="block_level", num_blocks_per_group=1)]
)
def test_group_offload(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    pipe = tiny_pipeline(tmp_path, codec(name, tmp_path))
    expected = video(pipe)
    pipe.transformer.enable_group_offload(CPU, **options)
    apply_group_offloading(pipe.text_encoder, onload_device=CPU, **options)
    apply_group_offloading(pipe.vae, onload_device=CPU, **options)
    assert torch.equal(video(pipe), expected)


def test_group_offload_of_a_pipeline(tmp_path: Path) -> None:
    pipe = tiny_pipeline(tmp_path, codec("tiny", tmp_path))
    expected = video(pipe)
    pipe.enable_group_offload(onload_device=CPU, offload_type="leaf_level")
    assert torch.equal(video(pipe), expected)


def test_weights_stored_in_8_bits(tmp_path: Path) -> None:
    pipe = tiny_pipeline(tmp_path, codec("tiny", tmp_path))
    expected = video(pipe)
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    found = video(pipe)
    assert 0 < (found - expected).abs().mean() < 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["tiny", "AutoencoderKLWan"])
@pytest.mark.parametrize(
    "mode", ["enable_model_cpu_offload", "enable_sequential_cpu_offload", "leaf", "block"]
)
def test_offload_to_the_cpu(name: str, mode: str, tmp_path: Path) -> None:
    pipe = tiny_pipeline(tmp_path, codec(name, tmp_path)).to("cuda")
    expected = video(pipe)
    pipe.to("cpu")
    if mode in ("leaf", "block"):
        blocks = {} if mode == "leaf" else {"num_blocks_per_group": 1}
        pipe.enable_group_offload(onload_device=torch.device("cuda"), offload_type=f"{mode}_level", **blocks)
    else:
        getattr(pipe, mode)()
    assert torch.equal(video(pipe), expected)
    assert torch.equal(video(pipe), expected), "a second call"
