"""Codec and text encoder as components of a diffusers pipeline."""

from pathlib import Path

import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from stdit.codecs import CodecConfig, TextEncoderConfig, build_codec, build_text_encoder
from stdit.codecs.base import VideoCodec
from stdit.codecs.pca import PCACodec
from stdit.diffusion.scheduler import RectifiedFlow
from stdit.errors import UserError
from stdit.pipelines.pipeline import STDiTPipeline
from tests.codecs.tiny import save_tiny_bert, save_tiny_vae
from tests.pipelines.tiny import tiny_model


def make_codec(name: str, directory: Path) -> VideoCodec:
    if name == "pca":
        codec = PCACodec((2, 4, 4), 12)
        codec.fit(torch.randn(4, 3, 4, 8, 8))
        return codec
    if name == "pixel":
        return build_codec(CodecConfig())
    path = str(save_tiny_vae(name, directory))
    return build_codec(CodecConfig(name=name, path=path))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["pixel", "pca", "AutoencoderKLWan"])
def test_pipelines_save_and_load_components(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    codec = make_codec(name, tmp_path / "vae")
    encoder = build_text_encoder(TextEncoderConfig(name="auto", path=str(save_tiny_bert(tmp_path / "bert"))))
    pipe = STDiTPipeline(tiny_model(codec.channels), codec, encoder, None, RectifiedFlow())
    pipe.save_pretrained(tmp_path / "pipeline")
    files = [file for file in (tmp_path / "pipeline").rglob("*") if file.is_file()]
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".txt"}

    again = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert type(again.codec) is type(codec)
    assert again.codec.fingerprint() == codec.fingerprint()
    assert again.prompt_encoder.fingerprint() == encoder.fingerprint()
    assert again.to("cpu").device == torch.device("cpu")
    assert "Expected types" not in capfd.readouterr().err

    half = DiffusionPipeline.from_pretrained(tmp_path / "pipeline", torch_dtype=torch.bfloat16)
    assert half.text_encoder.dtype == torch.bfloat16
    assert half.codec.dtype == (torch.bfloat16 if name.startswith("Auto") else torch.float32)


def test_options_are_honoured_or_refused(tmp_path: Path) -> None:
    build_codec(CodecConfig()).save_pretrained(tmp_path)
    VideoCodec.from_pretrained(tmp_path, low_cpu_mem_usage=True, use_safetensors=True, device_map=None)
    for place in ("meta", {"": "meta"}):
        codec = VideoCodec.from_pretrained(tmp_path, device_map=place)
        assert {tensor.device.type for tensor in codec.state_dict().values()} <= {"meta"}
    for wrong in ("auto", {"decoder": "cpu"}):
        with pytest.raises(UserError, match=f"device_map={wrong!r} is not supported"):
            VideoCodec.from_pretrained(tmp_path, device_map=wrong)
    with pytest.raises(UserError, match="use_safetensors=False is not supported"):
        VideoCodec.from_pretrained(tmp_path, use_safetensors=False)
    with pytest.raises(TypeError, match="unexpected keyword argument 'torch_type'"):
        VideoCodec.from_pretrained(tmp_path, torch_type=torch.float16)
