"""diffusers' shared tests of models, on STDiT, and on WanTransformer3DModel to compare."""

from typing import Any

import torch
from diffusers import WanTransformer3DModel

from stdit.models.stdit import STDiT
from tests.diffusers_suite.loading import define, diffusers_tests, with_layer_names

suite: Any = diffusers_tests("models.testing_utils")
LAYERS = {"to_q": "qkv", "to_k": "kv_linear", "to_v": "q_linear", "to_out.0": "attn.proj"}
lora_of_stdit = with_layer_names("models.testing_utils.lora", LAYERS)

SHAPE = {"patch_size": (1, 2, 2), "in_channels": 4}
LATENTS, TEXT = (2, 4, 2, 16, 16), (2, 12, 16)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


class STDiTConfig(suite.BaseModelTesterConfig):  # type: ignore[misc]
    """A small STDiT, of which no weight is zero."""

    pred_sigma = False

    @property
    def model_class(self) -> Any:
        return STDiT

    @property
    def main_input_name(self) -> str:
        return "hidden_states"

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (4 * (1 + self.pred_sigma), *LATENTS[2:])

    def get_init_dict(self) -> dict[str, Any]:
        return {
            **SHAPE,
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "caption_channels": 16,
            "model_max_length": 12,
            "gate_init": 1.0,
            "pred_sigma": self.pred_sigma,
        }

    def get_dummy_inputs(self, height: int = LATENTS[3], width: int = LATENTS[4]) -> dict[str, Any]:
        return {
            "hidden_states": random(*LATENTS[:3], height, width).to(self.torch_dtype),
            "timestep": torch.tensor([500.0, 500.0]),
            "encoder_hidden_states": random(*TEXT).to(self.torch_dtype),
            "fps": torch.tensor([8.0, 8.0]),
            "height": torch.tensor([32.0, 32.0]),
            "width": torch.tensor([32.0, 32.0]),
        }


class WanConfig(suite.BaseModelTesterConfig):  # type: ignore[misc]
    """Wan as in diffusers' own tests."""

    @property
    def model_class(self) -> Any:
        return WanTransformer3DModel

    @property
    def main_input_name(self) -> str:
        return "hidden_states"

    @property
    def output_shape(self) -> tuple[int, ...]:
        return LATENTS[1:]

    def get_init_dict(self) -> dict[str, Any]:
        return {
            **SHAPE,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "out_channels": 4,
            "text_dim": 16,
            "freq_dim": 256,
            "ffn_dim": 32,
            "num_layers": 2,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 32,
        }

    def get_dummy_inputs(self, height: int = LATENTS[3], width: int = LATENTS[4]) -> dict[str, Any]:
        return {
            "hidden_states": random(*LATENTS[:3], height, width).to(self.torch_dtype),
            "timestep": torch.tensor([500, 500]),
            "encoder_hidden_states": random(*TEXT).to(self.torch_dtype),
        }


class GradientCheckpointing:
    """The class whose checkpointing the tests look for."""

    def test_gradient_checkpointing_is_applied(self) -> None:
        expected = {self.model_class.__name__}  # type: ignore[attr-defined]
        super().test_gradient_checkpointing_is_applied(expected_set=expected)  # type: ignore[misc]


FASTER = {
    "spatial_attention_block_skip_range": 2,
    "spatial_attention_timestep_skip_range": (-1, 901),
    "tensor_format": "BCFHW",
}
MIXINS: dict[str, dict[str, Any]] = {
    "ModelTesterMixin": {},
    "MemoryTesterMixin": {},
    "TrainingTesterMixin": {},
    "AttentionTesterMixin": {},
    "AttentionBackendTesterMixin": {},
    "TorchCompileTesterMixin": {"different_shapes_for_compilation": [(16, 16), (16, 24), (32, 40)]},
    "PyramidAttentionBroadcastTesterMixin": {
        "PAB_CONFIG": {"spatial_attention_block_skip_range": 2},
    },
    "FirstBlockCacheTesterMixin": {},
    "FasterCacheTesterMixin": {"FASTER_CACHE_CONFIG": FASTER},
    "MagCacheTesterMixin": {},
    "TaylorSeerCacheTesterMixin": {},
    "LoraTesterMixin": {},
    "LoraHotSwappingForModelTesterMixin": {},
}
CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "STDiT": (STDiTConfig, {}),
    "STDiTWithSigma": (STDiTConfig, {"pred_sigma": True}),
    "Wan": (WanConfig, {}),
}
for _config, (_base, _settings) in CONFIGS.items():
    for _mixin, _attributes in MIXINS.items():
        _name = f"Test{_config}{_mixin.removesuffix('TesterMixin')}"
        _where = lora_of_stdit if "Lora" in _mixin and _base is STDiTConfig else suite
        _bases = [_base, getattr(_where, _mixin)]
        if _mixin == "TrainingTesterMixin":
            _bases.insert(0, GradientCheckpointing)
        define(globals(), _name, *_bases, **_settings, **_attributes)
