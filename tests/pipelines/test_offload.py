"""Offloading and casting: the same video as without."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import apply_group_offloading
from torch import Tensor

from stdit.codecs import CodecConfig, build_codec
from stdit.pipelines.pipeline import STDiTPipeline
from tests.codecs.tiny import save_tiny_vae, tiny_opensora_vae
from tests.pipelines.tiny import assert_same, tiny_pipeline

CPU = torch.device("cpu")
CODECS = ["tiny", "opensora", "AutoencoderKLWan", "AutoencoderKL"]


def video(pipe: STDiTPipeline, **settings: Any) -> Tensor:
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
        **settings,
    ).frames
    return found.cpu()


def codec(name: str, folder: Path) -> Any:
    if name == "tiny":
        return build_codec(CodecConfig(name="tiny"))
    if name == "opensora":
        return tiny_opensora_vae()
    return build_codec(CodecConfig(name=name, path=str(save_tiny_vae(name, folder / "vae"))))


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize(
    "options", [dict(offload_type="leaf_level"), dict(offload_type="block_level", num_blocks_per_group=1)]
)
def test_group_offload(name: str, options: dict[str, Any], on_disk: bool, tmp_path: Path) -> None:
    pipe = tiny_pipeline(tmp_path, codec(name, tmp_path))
    expected = video(pipe)
    for part in ("transformer", "text_encoder", "vae"):
        if on_disk:
            options = options | {"offload_to_disk_path": str(tmp_path / part)}
        apply_group_offloading(getattr(pipe, part), onload_device=CPU, **options)
    assert_same(video(pipe), expected)


def test_group_offload_of_a_pipeline(tmp_path: Path) -> None:
    pipe = tiny_pipeline(tmp_path, codec("tiny", tmp_path))
    expected = video(pipe)
    pipe.enable_group_offload(onload_device=CPU, offload_type="leaf_level")
    assert_same(video(pipe), expected)


@pytest.mark.parametrize("name", CODECS)
def test_sequential_offload(name: str, tmp_path: Path) -> None:
    """As `enable_sequential_cpu_offload`, which needs an accelerator, but to the CPU: weights are away in between."""
    pipe = tiny_pipeline(tmp_path, codec(name, tmp_path))
    expected = video(pipe)
    for part in (pipe.transformer, pipe.text_encoder, pipe.vae):
        cpu_offload(part, CPU)
    assert {p.device.type for p in pipe.vae.parameters()} == {"meta"}
    assert_same(video(pipe), expected)


@pytest.mark.parametrize("mode", ["sequential", "leaf_level", "block_level"])
def test_the_pipeline_that_comes_with_stdit(mode: str, tmp_path: Path) -> None:
    """Its codec and text encoder are of stdit."""
    pipe = STDiTPipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    expected = video(pipe, num_inference_steps=1, refine_pairs=0)
    for part in ("transformer", "text_encoder", "vae"):
        module = getattr(pipe, part)
        if mode == "sequential":
            cpu_offload(module, CPU)
        else:
            blocks = {"num_blocks_per_group": 1} if mode == "block_level" else {}
            folder = str(tmp_path / part)
            apply_group_offloading(module, CPU, offload_type=mode, offload_to_disk_path=folder, **blocks)
    assert_same(video(pipe, num_inference_steps=1, refine_pairs=0), expected)


def test_casting_to_the_same_precision_changes_nothing(tmp_path: Path) -> None:
    pipe = tiny_pipeline(tmp_path, codec("AutoencoderKLWan", tmp_path))
    expected = video(pipe)
    for model in (pipe.transformer, pipe.vae):
        model.enable_layerwise_casting(torch.float32, torch.float32)
    assert_same(video(pipe), expected)


def test_weights_stored_in_8_bits(tmp_path: Path) -> None:
    pipe = tiny_pipeline(tmp_path, codec("tiny", tmp_path))
    expected = video(pipe)
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    found = video(pipe)
    assert 0 < (found - expected).abs().mean() < 0.05


@pytest.mark.parametrize("name", ["tiny", "AutoencoderKLWan", "AutoencoderKL"])
def test_slices_and_tiles_of_the_vae(name: str, tmp_path: Path) -> None:
    """A pipeline decodes one video at a time: slices change nothing, but for those of an image VAE."""
    pipe = tiny_pipeline(tmp_path, codec(name, tmp_path))
    expected = video(pipe)
    pipe.vae.enable_slicing()
    sliced = video(pipe)
    torch.testing.assert_close(sliced, expected, atol=1e-5, rtol=0)
    assert torch.equal(sliced, expected) or name == "AutoencoderKL"
    pipe.vae.disable_slicing()
    pipe.vae.enable_tiling()
    if name == "tiny":  # our own tiles, larger than this video
        assert_same(video(pipe), expected)
        return
    pipe.vae.tile_sample_min_size = pipe.vae.tile_sample_min_height = pipe.vae.tile_sample_min_width = 8
    pipe.vae.tile_latent_min_size = 4
    pipe.vae.tile_sample_stride_height = pipe.vae.tile_sample_stride_width = 8
    tiled = video(pipe)
    assert tiled.shape == expected.shape and not torch.equal(tiled, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*CODECS, "bundled"])
@pytest.mark.parametrize(
    "mode", ["enable_model_cpu_offload", "enable_sequential_cpu_offload", "leaf", "block", "leaf stream"]
)
def test_offload_to_the_cpu(name: str, mode: str, tmp_path: Path) -> None:
    bundled = name == "bundled"
    pipe = STDiTPipeline.from_pretrained() if bundled else tiny_pipeline(tmp_path, codec(name, tmp_path))
    pipe.to("cuda")
    expected = video(pipe)
    pipe.to("cpu")
    level, _, stream = mode.partition(" ")
    if level in ("leaf", "block"):
        options: dict[str, Any] = {"use_stream": bool(stream)}
        options |= {} if level == "leaf" else {"num_blocks_per_group": 1}
        pipe.enable_group_offload(
            onload_device=torch.device("cuda"), offload_type=f"{level}_level", **options
        )
    else:
        getattr(pipe, mode)()
    assert_same(video(pipe), expected)
    assert_same(video(pipe), expected)  # a second call
