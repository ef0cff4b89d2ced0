"""What users of diffusers do with adapters and caches of a pipeline: short forms of its shared tests.

tests/diffusers_suite lists the tests of callbacks, from_pipe, saving, offloading and quantised models.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from torch import Tensor

from stdit.pipelines.pipeline import STDiTPipeline
from tests.lora.tiny import write_random_adapter
from tests.pipelines.tiny import tiny_pipeline


def latents(pipe: STDiTPipeline, steps: int = 3, **settings: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe(
        "a star", generator=generator, num_inference_steps=steps, output_type="latent", **settings
    ).frames


@pytest.fixture
def pipe(tmp_path: Path) -> STDiTPipeline:
    return tiny_pipeline(tmp_path)


@pytest.fixture
def with_adapters(pipe: STDiTPipeline, tmp_path: Path) -> Iterator[tuple[STDiTPipeline, Tensor]]:
    """A pipeline with two adapters, the first of which is active, and the latents without any."""
    plain = latents(pipe)
    for name, targets in (("a", "attention"), ("b", "mlp")):
        file = write_random_adapter(tmp_path / name, pipe.transformer, targets=targets)
        pipe.load_lora_weights(file, adapter_name=name)
    pipe.set_adapters("a")
    yield pipe, plain


def test_adapters_are_disabled_and_enabled(with_adapters: tuple[STDiTPipeline, Tensor]) -> None:
    pipe, plain = with_adapters
    active = latents(pipe)
    assert not torch.allclose(active, plain, atol=1e-3)
    pipe.disable_lora()
    assert torch.equal(latents(pipe), plain)
    pipe.enable_lora()
    assert torch.equal(latents(pipe), active)


def test_adapters_are_listed_chosen_and_deleted(with_adapters: tuple[STDiTPipeline, Tensor]) -> None:
    pipe, plain = with_adapters
    assert pipe.get_active_adapters() == ["a"]
    assert pipe.get_list_adapters() == {"transformer": ["a", "b"]}
    a = latents(pipe)
    pipe.set_adapters(["a", "b"])
    assert not torch.allclose(latents(pipe), a, atol=1e-3)
    pipe.delete_adapters("b")
    assert torch.equal(latents(pipe), a)
    pipe.delete_adapters("a")
    assert torch.equal(latents(pipe), plain)


def test_a_weight_is_a_scale(with_adapters: tuple[STDiTPipeline, Tensor]) -> None:
    pipe, plain = with_adapters
    half = latents(pipe, attention_kwargs={"scale": 0.5})
    torch.testing.assert_close(latents(pipe, attention_kwargs={"scale": 0.0}), plain)
    pipe.set_adapters("a", 0.5)
    torch.testing.assert_close(latents(pipe), half)
    assert not torch.allclose(half, plain, atol=1e-3)


def test_each_part_has_its_weight(with_adapters: tuple[STDiTPipeline, Tensor]) -> None:
    pipe, plain = with_adapters
    pipe.set_adapters("a", [{"transformer": 0.0}])
    torch.testing.assert_close(latents(pipe), plain)


@pytest.mark.parametrize("names", [["a"], ["a", "b"]])
def test_merged_adapters_are_taken_out_again(
    names: list[str], with_adapters: tuple[STDiTPipeline, Tensor]
) -> None:
    pipe, plain = with_adapters
    pipe.set_adapters(names, [0.5] * len(names))
    expected = latents(pipe)
    pipe.fuse_lora(adapter_names=names)
    assert pipe.num_fused_loras == len(names)
    torch.testing.assert_close(latents(pipe), expected, atol=1e-4, rtol=1e-4)
    pipe.unfuse_lora()
    torch.testing.assert_close(latents(pipe), expected, atol=1e-4, rtol=1e-4)
    pipe.unload_lora_weights()
    torch.testing.assert_close(latents(pipe), plain, atol=1e-4, rtol=1e-4)


def test_an_adapter_with_nan_is_not_merged(with_adapters: tuple[STDiTPipeline, Tensor]) -> None:
    pipe, _ = with_adapters
    pipe.transformer.blocks[0].attn.qkv.lora_A["a"].weight.data.fill_(float("nan"))
    with pytest.raises(ValueError):
        pipe.fuse_lora(adapter_names=["a"], safe_fusing=True)


def test_a_merged_model_is_saved_and_read(
    with_adapters: tuple[STDiTPipeline, Tensor], tmp_path: Path
) -> None:
    pipe, _ = with_adapters
    expected = latents(pipe)
    pipe.fuse_lora(adapter_names=["a"])
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "merged")
    again = DiffusionPipeline.from_pretrained(tmp_path / "merged")
    again.set_progress_bar_config(disable=True)
    assert type(again) is STDiTPipeline
    torch.testing.assert_close(latents(again), expected, atol=1e-4, rtol=1e-4)


def test_adapters_are_shared_by_a_pipeline_from_another(with_adapters: tuple[STDiTPipeline, Tensor]) -> None:
    pipe, _ = with_adapters
    again = STDiTPipeline.from_pipe(pipe)
    again.set_progress_bar_config(disable=True)
    assert again.get_active_adapters() == ["a"]
    assert torch.equal(latents(again), latents(pipe))


def test_another_adapter_takes_the_place_of_one(
    with_adapters: tuple[STDiTPipeline, Tensor], tmp_path: Path
) -> None:
    pipe, _ = with_adapters
    pipe.delete_adapters("b")
    expected = latents(pipe)
    for parameter in (p for name, p in pipe.transformer.named_parameters() if "lora_B" in name):
        parameter.data.mul_(-1)
    assert not torch.allclose(latents(pipe), expected, atol=1e-3)
    pipe.load_lora_weights(tmp_path / "a", adapter_name="a", hotswap=True)
    torch.testing.assert_close(latents(pipe), expected)


@pytest.mark.parametrize("cache", ["pyramid", "first_block", "mag", "taylor"])
def test_a_cache_changes_the_video_and_is_taken_out_again(cache: str, pipe: STDiTPipeline) -> None:
    """A second call with it gives the same: no state is left of the first."""
    plain, model = latents(pipe, 6), pipe.transformer

    def timestep() -> Any:
        return pipe.current_timestep

    configs = {
        "pyramid": lambda: PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 1001),
            spatial_attention_block_identifiers=model.block_patterns("spatial"),
            current_timestep_callback=timestep,
        ),
        "first_block": lambda: FirstBlockCacheConfig(threshold=2.0),
        "mag": lambda: MagCacheConfig(
            num_inference_steps=6, mag_ratios=[1.0] * 6, threshold=10.0, max_skip_steps=2, retention_ratio=0.2
        ),
        "taylor": lambda: TaylorSeerCacheConfig(
            cache_interval=2, disable_cache_before_step=2, max_order=1, taylor_factors_dtype=torch.float32
        ),
    }
    model.enable_cache(configs[cache]())
    cached = latents(pipe, 6)
    assert cached.isfinite().all() and not torch.equal(cached, plain)
    assert torch.equal(latents(pipe, 6), cached)
    model.disable_cache()
    assert torch.equal(latents(pipe, 6), plain)
