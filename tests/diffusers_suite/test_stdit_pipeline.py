"""diffusers' shared tests of pipelines, on STDiTPipeline, and on WanPipeline to compare."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from transformers import AutoTokenizer, T5EncoderModel

from stdit.diffusion.scheduler import RectifiedFlow
from stdit.models.stdit import STDiT
from stdit.pipelines.pipeline import STDiTPipeline
from tests.codecs.tiny import save_tiny_t5
from tests.diffusers_suite.loading import define, diffusers_tests

suite: Any = diffusers_tests("pipelines.testing_utils")

OPTIONAL = frozenset(
    ["num_inference_steps", "num_videos_per_prompt", "generator", "latents", "output_type", "return_dict"]
)


class Shared:
    """The same small T5, from a folder made once per class, and the same inputs for both pipelines."""

    folder: Path

    @pytest.fixture(autouse=True, scope="class")
    def _text_model(self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
        request.cls.folder = save_tiny_t5(tmp_path_factory.mktemp("t5") / "t5")

    def text_components(self) -> dict[str, Any]:
        return {
            "text_encoder": T5EncoderModel.from_pretrained(self.folder).eval(),
            "tokenizer": AutoTokenizer.from_pretrained(self.folder),
        }

    def get_dummy_inputs(self: Any) -> dict[str, Any]:
        return {
            "prompt": "a red circle",
            "negative_prompt": "a blue square",
            "generator": self.get_generator(0),
            "num_inference_steps": 2,
            "guidance_scale": 6.0,
            "height": 16,
            "width": 16,
            "num_frames": 9,
            "max_sequence_length": 16,
            "output_type": "pt",
        }


def small_vae() -> AutoencoderKLWan:
    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )


class STDiTPipelineConfig(Shared, suite.BasePipelineTesterConfig):  # type: ignore[misc]
    pipeline_class = STDiTPipeline
    required_input_params_in_call_signature = frozenset(
        ["prompt", "negative_prompt", "height", "width", "guidance_scale", "prompt_embeds"]
    )
    batch_input_params = frozenset(["prompt"])
    optional_input_params = OPTIONAL
    output_shape = (9, 3, 16, 16)
    pred_sigma = False

    def get_dummy_components(self, num_layers: int = 2) -> dict[str, Any]:
        vae = small_vae()
        text = self.text_components()
        torch.manual_seed(0)
        transformer = STDiT(
            depth=num_layers,
            hidden_size=24,
            num_heads=2,
            in_channels=16,
            patch_size=(1, 2, 2),
            caption_channels=text["text_encoder"].config.d_model,
            model_max_length=32,
            gate_init=1.0,
            pred_sigma=self.pred_sigma,
        )
        scheduler = RectifiedFlow()
        return {"transformer": transformer, "vae": vae, "scheduler": scheduler, **text}


class STDiTOptionalComponents:
    """The text encoder and the tokenizer are optional: with text states instead of a prompt."""

    def test_save_load_optional_components(self: Any, tmp_path: Path) -> None:
        pipe = self.get_pipeline()
        names = ("prompt_embeds", "prompt_attention_mask")
        states = dict(zip(names, pipe.encode_prompt("a red circle"), strict=False))
        pipe.text_encoder = pipe.tokenizer = None
        inputs = {
            **self.get_dummy_inputs(),
            "prompt": None,
            "negative_prompt": None,
            "max_sequence_length": None,
            **states,
        }
        output = pipe(**inputs)[0]
        pipe.save_pretrained(tmp_path)
        loaded = self.pipeline_class.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=None)
        assert loaded.text_encoder is None and loaded.tokenizer is None
        inputs["generator"] = self.get_generator(0)
        torch.testing.assert_close(loaded(**inputs)[0], output, atol=1e-4, rtol=0)


class WanPipelineConfig(Shared, suite.BasePipelineTesterConfig):  # type: ignore[misc]
    pipeline_class = WanPipeline
    required_input_params_in_call_signature = STDiTPipelineConfig.required_input_params_in_call_signature
    batch_input_params = frozenset(["prompt"])
    optional_input_params = OPTIONAL
    output_shape = (9, 3, 16, 16)

    def get_dummy_components(self, num_layers: int = 2) -> dict[str, Any]:
        vae = small_vae()
        text = self.text_components()
        torch.manual_seed(0)
        transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=text["text_encoder"].config.d_model,
            freq_dim=256,
            ffn_dim=32,
            num_layers=num_layers,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        )
        scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
        return {
            "transformer": transformer,
            "vae": vae,
            "scheduler": scheduler,
            "transformer_2": None,
            **text,
        }


MIXINS: dict[str, dict[str, Any]] = {
    "PipelineTesterMixin": {},
    "MemoryTesterMixin": {},
    "PyramidAttentionBroadcastTesterMixin": {},
    "FirstBlockCacheTesterMixin": {},
    "FasterCacheTesterMixin": {},
    "MagCacheTesterMixin": {},
    "TaylorSeerCacheTesterMixin": {},
    "LoraTesterMixin": {},
    "LoraMemoryTesterMixin": {},
}
SPATIAL = [rf"blocks\.{index}\." for index in (0, 2)]
OF_STDIT: dict[str, dict[str, Any]] = {
    "PyramidAttentionBroadcastTesterMixin": {
        "PAB_CONFIG": {
            "spatial_attention_block_skip_range": 2,
            "spatial_attention_timestep_skip_range": (100, 800),
            "spatial_attention_block_identifiers": SPATIAL,
        }
    },
    "LoraTesterMixin": {
        "denoiser_target_modules": {"transformer": ["qkv", "q_linear", "kv_linear", "attn.proj"]}
    },
}
OF_STDIT["LoraMemoryTesterMixin"] = OF_STDIT["LoraTesterMixin"]
CONFIGS: dict[str, tuple[type, dict[str, Any], dict[str, dict[str, Any]]]] = {
    "STDiT": (STDiTPipelineConfig, {}, OF_STDIT),
    "STDiTWithSigma": (STDiTPipelineConfig, {"pred_sigma": True}, OF_STDIT),
    "Wan": (WanPipelineConfig, {}, {}),
}
for _config, (_base, _settings, _adapted) in CONFIGS.items():
    for _mixin in MIXINS:
        _attributes = {**_settings, **_adapted.get(_mixin, {})}
        _name = f"Test{_config}Pipeline{_mixin.removesuffix('TesterMixin')}"
        _bases = [_base, getattr(suite, _mixin)]
        if _mixin == "PipelineTesterMixin" and _base is STDiTPipelineConfig:
            _bases.insert(0, STDiTOptionalComponents)
        define(globals(), _name, *_bases, **_attributes)
