"""Quantisation configs of diffusers and transformers: for the transformer, for T5, saved, and with adapters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from diffusers import TorchAoConfig as TorchAoOfDiffusers
from torch import Tensor, nn
from torchao.quantization import Int8Tensor, Int8WeightOnlyConfig
from transformers import TorchAoConfig as TorchAoOfTransformers

import sample
from stdit.codecs import TextEncoderConfig, build_text_encoder
from stdit.errors import UserError
from stdit.lora.files import base_hash
from stdit.models.stdit import STDiT
from stdit.pipelines.pipeline import STDiTPipeline
from stdit.pipelines.weights import open_initial_weights
from tests.codecs.tiny import save_tiny_t5
from tests.lora.tiny import write_random_adapter
from tests.pipelines.tiny import tiny_model, tiny_pipeline

INT8 = Int8WeightOnlyConfig()
CONFIGS = {"transformer": TorchAoOfDiffusers(INT8), "text_encoder": TorchAoOfTransformers(INT8)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with a T5."""
    folder = tmp_path_factory.mktemp("quantised")
    pipe = tiny_pipeline(folder)
    t5 = build_text_encoder(TextEncoderConfig(name="t5", path=str(save_tiny_t5(folder / "t5"))))
    others = {name: getattr(pipe, name) for name in ("transformer", "vae", "scheduler")}
    settings = {name: pipe.config[name] for name in ("num_frames", "height", "width", "num_inference_steps")}
    STDiTPipeline(text_encoder=t5, tokenizer=None, **others, **settings).save_pretrained(folder / "saved")
    return folder / "saved"


def load(source: Path, *quantised: str, cls: Any = STDiTPipeline, **options: Any) -> Any:
    """Load a pipeline with these components in 8 bits."""
    if quantised:
        options["quantization_config"] = PipelineQuantizationConfig(
            quant_mapping={name: CONFIGS[name] for name in quantised}
        )
    pipe = cls.from_pretrained(str(source), **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def video(pipe: STDiTPipeline) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    found: Tensor = pipe("a red circle", generator=generator, output_type="pt").frames
    return found


def rounded(model: nn.Module) -> set[bool]:
    """Return whether the weights of the linear layers are in 8 bits."""
    return {isinstance(part.weight, Int8Tensor) for part in model.modules() if isinstance(part, nn.Linear)}


@pytest.mark.parametrize("cls", [STDiTPipeline, DiffusionPipeline])
@pytest.mark.parametrize("quantised", [["transformer"], ["text_encoder"], ["transformer", "text_encoder"]])
def test_components_of_a_pipeline(cls: Any, quantised: list[str], folder: Path, tmp_path: Path) -> None:
    expected = video(load(folder, torch_dtype=torch.bfloat16))
    pipe = load(folder, *quantised, cls=cls, torch_dtype=torch.bfloat16)
    for name in CONFIGS:
        assert rounded(getattr(pipe, name)) == {name in quantised}
    found = video(pipe)
    assert (found - expected).abs().max() < 0.03 and not torch.equal(found, expected)
    pipe.save_pretrained(tmp_path)
    again = load(tmp_path, cls=cls, torch_dtype=torch.bfloat16)
    for name in CONFIGS:
        assert rounded(getattr(again, name)) == {name in quantised}
    assert torch.equal(video(again), found)


def test_a_model_alone(folder: Path, tmp_path: Path) -> None:
    config = TorchAoOfDiffusers(INT8, modules_to_not_convert=["blocks.3", "final_layer"])
    model = STDiT.from_pretrained(folder / "transformer", quantization_config=config)
    assert rounded(model.blocks[0]) == rounded(model.t_block) == {True}
    assert rounded(model.blocks[3]) == rounded(model.final_layer) == {False}
    model.save_pretrained(tmp_path)
    again = STDiT.from_pretrained(tmp_path)
    assert rounded(again.blocks[0]) == {True} and rounded(again.blocks[3]) == {False}
    with pytest.raises(UserError, match="its weights are quantised, and a training begins with those"):
        open_initial_weights(str(tmp_path))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quanto(kind: str, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("optimum.quanto")
    from diffusers import QuantoConfig
    from transformers import QuantoConfig as QuantoOfTransformers

    expected = video(load(folder))
    mapping = {
        "transformer": QuantoConfig(weights_dtype=kind),
        "text_encoder": QuantoOfTransformers(weights=kind),
    }
    pipe = load(folder, quantization_config=PipelineQuantizationConfig(quant_mapping=mapping))
    found = video(pipe)
    assert 0 < (found - expected).abs().mean() < (0.01 if kind == "int8" else 0.05)
    with pytest.raises(
        UserError, match="text_encoder is quantised by a QuantoConfig, and transformers cannot"
    ):
        pipe.save_pretrained(tmp_path)
    pipe.transformer.save_pretrained(tmp_path)
    pipe.transformer = STDiT.from_pretrained(tmp_path)
    assert torch.equal(video(pipe), found)


def test_what_cannot_be_saved_is_refused_before_anything_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = load(folder, "transformer")
    monkeypatch.setattr(type(pipe.transformer.hf_quantizer), "is_serializable", False)
    with pytest.raises(
        UserError, match="transformer is quantised by a TorchAoConfig, and diffusers cannot save"
    ):
        pipe.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "mapping, message",
    [
        (
            {"unet": CONFIGS["transformer"]},
            "names unet: the pipeline has scheduler, text_encoder,",
        ),
        (
            {"text_encoder": CONFIGS["transformer"]},
            "of text_encoder is a diffusers.*of that name in transformers",
        ),
        (
            {"transformer": CONFIGS["text_encoder"]},
            "of transformer is a transformers.*of that name in diffusers",
        ),
        ({"vae": CONFIGS["transformer"]}, "codecs and text encoders of stdit cannot be quantised"),
    ],
)
def test_configs_that_do_not_fit(mapping: dict[str, Any], message: str, folder: Path) -> None:
    config = PipelineQuantizationConfig(quant_mapping=mapping)
    with pytest.raises(UserError, match=f"quantization_config.*{message}"):
        load(folder, quantization_config=config)


def test_adapters_on_a_quantised_model(folder: Path, tmp_path: Path) -> None:
    full, pipe = load(folder), load(folder, "transformer")
    file = str(write_random_adapter(tmp_path / "a.safetensors", tiny_model()))
    base = video(pipe)
    for one in (full, pipe):
        one.load_lora_weights(file, adapter_name="a")
    found = video(pipe)
    assert (found - video(full)).abs().max() < 0.05 < (found - base).abs().max()
    pipe.set_adapters("a", 0.0)
    assert torch.equal(video(pipe), base)
    pipe.set_adapters("a", 1.0)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert (video(pipe) - found).abs().max() < 0.03, "rounded again"


def test_on_the_command_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(folder, "transformer").save_pretrained(tmp_path / "saved")

    def frames(name: str, *flags: Any) -> Any:
        output = tmp_path / name
        argv = ["sample.py", "--checkpoint", tmp_path / "saved", "--prompt", "a", "--output", output]
        monkeypatch.setattr("sys.argv", list(map(str, [*argv, *flags])))
        sample.main()
        return list(output.glob("*.mp4"))

    with pytest.raises(
        UserError, match="dtype = fp32: the transformer is quantised and computes in torch.bfloat16"
    ):
        frames("a")
    assert frames("b", "--dtype", "bf16")
    model = tiny_model()
    file = write_random_adapter(tmp_path / "a.safetensors", model, base_hash(model))
    with pytest.raises(UserError, match="cannot be compared with the quantised ones of this model"):
        frames("c", "--dtype", "bf16", "--lora", file)
    assert frames("d", "--dtype", "bf16", "--lora", file, "--lora_other_base")
