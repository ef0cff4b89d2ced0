"""What users of diffusers expect of a model: output class, attention backends, caches, low precision, compilation."""

from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FasterCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    attention_backend,
)
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from stdit.models import attention as module
from stdit.models.attention import CrossAttention, SelfAttention
from stdit.models.stdit import STDiT
from tests.pipelines.tiny import tiny_model

LAYERS = 8
"""Attention layers of the tiny model: self- and cross-attention of two spatial and two temporal blocks."""


def inputs(batch: int = 2, frames: int = 3, height: int = 8, width: int = 10) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    visible = torch.ones(batch, 5, dtype=torch.bool)
    visible[0, 3:] = False
    return {
        "hidden_states": torch.randn(batch, 3, frames, height, width, generator=generator),
        "timestep": torch.full((batch,), 300.0),
        "encoder_hidden_states": torch.randn(batch, 5, 16, generator=generator),
        "encoder_attention_mask": visible,
        **{name: torch.full((batch,), 8.0) for name in ("fps", "height", "width")},
    }


def sample(model: STDiT, **changes: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs() | changes).sample


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The backends of all calls of diffusers' dispatcher; its active backend is restored."""
    seen: list[str] = []
    original = module.dispatch_attention_fn
    before = _AttentionBackendRegistry.get_active_backend()[0]

    def dispatch(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["backend"].value)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, "dispatch_attention_fn", dispatch)
    yield seen
    _AttentionBackendRegistry.set_active_backend(before)


def test_the_output_is_diffusers_output_class_or_a_tuple() -> None:
    model = tiny_model()
    output = model(**inputs())
    assert isinstance(output, Transformer2DModelOutput) and output[0] is output.sample
    (alone,) = model(**inputs(), return_dict=False)
    assert torch.equal(alone, output.sample)


@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_an_attention_backend_reaches_every_layer(backend: str, dispatched: list[str]) -> None:
    model = tiny_model()
    expected = sample(model)
    assert dispatched == []
    model.set_attention_backend(backend)
    torch.testing.assert_close(sample(model), expected, atol=1e-5, rtol=1e-5)
    assert dispatched == [backend] * LAYERS
    model.reset_attention_backend()
    _AttentionBackendRegistry.set_active_backend(
        AttentionBackendName.NATIVE
    )  # diffusers leaves the active one
    dispatched.clear()
    assert torch.equal(sample(model), expected) and dispatched == []


def test_an_attention_backend_for_a_block_of_code(dispatched: list[str]) -> None:
    model = tiny_model()
    expected = sample(model)
    with attention_backend("_native_math"):
        found = sample(model)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert dispatched == ["_native_math"] * LAYERS


def test_a_caption_without_a_visible_token_adds_nothing_with_a_backend_too(dispatched: list[str]) -> None:
    model, nothing = tiny_model(), torch.zeros(2, 5, dtype=torch.bool)
    expected = sample(model, encoder_attention_mask=nothing)
    model.set_attention_backend("native")
    found = sample(model, encoder_attention_mask=nothing)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert found.isfinite().all() and len(dispatched) == LAYERS


@pytest.mark.parametrize("visible", [None, 3])
def test_a_backend_that_takes_no_masks(visible: int | None, dispatched: list[str]) -> None:
    model = tiny_model()
    mask = None if visible is None else torch.arange(5)[None] < torch.tensor([[visible], [5]])
    expected = sample(model, encoder_attention_mask=mask)
    model.set_attention_backend("_native_flash")
    found = sample(model, encoder_attention_mask=mask)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    masked = sum(name.endswith("cross_attn") for name, _ in model.named_modules())
    assert 0 < masked < LAYERS and len(dispatched) == LAYERS - (masked if visible else 0)


def test_processors_can_be_replaced() -> None:
    model = tiny_model()
    assert len(model.attn_processors) == LAYERS

    class Silent:
        def __call__(self, attn: SelfAttention | CrossAttention, x: Tensor, *others: Any) -> Tensor:
            return torch.zeros_like(x)

    expected = sample(model)
    processors = model.attn_processors
    model.set_attn_processor(Silent())
    assert not torch.allclose(sample(model), expected, atol=1e-3)
    model.set_attn_processor(processors)
    assert torch.equal(sample(model), expected)


@pytest.mark.parametrize("kind", ["spatial", "temporal", "cross"])
def test_pyramid_attention_broadcast_repeats_attention(kind: str) -> None:
    model = tiny_model()
    other = inputs()["hidden_states"].flip(0)
    exact = sample(model, hidden_states=other)
    model.enable_cache(
        PyramidAttentionBroadcastConfig(
            **{f"{kind}_attention_block_skip_range": 2},
            spatial_attention_block_identifiers=model.block_patterns("spatial"),
            temporal_attention_block_identifiers=model.block_patterns("temporal"),
            current_timestep_callback=lambda: 500,
        )
    )
    sample(model)
    repeated = sample(model, hidden_states=other)
    assert repeated.isfinite().all() and not torch.allclose(repeated, exact, atol=1e-4)
    model.disable_cache()
    assert torch.equal(sample(model, hidden_states=other), exact)


def test_faster_cache_computes_the_conditional_half() -> None:
    """Values of `[B]` and a null caption, which it does not halve, belong to the conditional rows."""
    model = tiny_model()
    given = inputs(batch=4) | {"fps": torch.tensor([8.0, 9, 10, 11])}
    given["drop_caption"] = torch.tensor([True, False, False, True])
    conditional = {name: value[2:] for name, value in given.items()}
    expected = sample(model, **given), sample(model, **conditional)
    model.enable_cache(
        FasterCacheConfig(
            unconditional_batch_skip_range=2,
            unconditional_batch_timestep_skip_range=(0, 1000),
            spatial_attention_block_identifiers=model.block_patterns("spatial"),
            temporal_attention_block_identifiers=model.block_patterns("temporal"),
            spatial_attention_timestep_skip_range=(-1, 0),
            temporal_attention_timestep_skip_range=(-1, 0),
            current_timestep_callback=lambda: 500,
            tensor_format="BCFHW",
        )
    )
    whole, approximated = sample(model, **given), sample(model, **given)
    torch.testing.assert_close(whole, expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(approximated[2:], expected[1], atol=1e-5, rtol=1e-5)
    assert approximated.isfinite().all()


@pytest.mark.parametrize("name", ["fps", "width", "drop_caption"])
def test_values_of_another_batch_are_an_error(name: str) -> None:
    with pytest.raises(ValueError, match=r"3 values: must be \[1\] or \[B\] \(here B = 2\)"):
        sample(tiny_model(), **{name: torch.ones(3, dtype=torch.bool)})


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.bfloat16])
def test_weights_are_stored_in_low_precision_and_computed_with_in_another(storage: torch.dtype) -> None:
    model = tiny_model()
    expected = sample(model)
    model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    stored = {parameter.dtype for parameter in model.parameters()}
    assert storage in stored
    found = sample(model)
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.2 * expected.norm()


@pytest.mark.slow
def test_a_whole_model_compiles_in_one_graph_for_all_sizes() -> None:
    """The second size shows that sizes differ; all larger ones use its graph."""
    model, graphs = tiny_model(), []
    torch.compiler.reset()

    def count(graph: Any, example: Any) -> Any:
        graphs.append(len(example))
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=count)
    with torch.no_grad():
        for size in ((2, 3, 8, 10), (2, 4, 12, 6), (2, 5, 30, 34), (2, 7, 66, 50)):
            expected = model(**inputs(*size)).sample
            torch.testing.assert_close(compiled(**inputs(*size)).sample, expected, atol=1e-5, rtol=1e-5)
    assert len(graphs) <= 2


def test_blocks_alone_compile_as_repeated_ones() -> None:
    model = tiny_model()
    expected = sample(model)
    torch.compiler.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(sample(model), expected, atol=1e-5, rtol=1e-5)


def test_weights_are_saved_in_shards_and_variants(tmp_path: Any) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB", variant="fp32")
    assert len(list(tmp_path.glob("*.fp32-*-of-*.safetensors"))) > 1
    again = STDiT.from_pretrained(tmp_path, variant="fp32")
    assert torch.equal(sample(again), sample(model))
    assert isinstance(again, diffusers.ModelMixin)
