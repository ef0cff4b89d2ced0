"""The converter: a folder that training takes, the same tensors on the way back, nothing half-written."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from scripts.convert_opensora import main
from stdit.codecs.pixel import PixelCodec
from stdit.diffusion.config import FlowConfig
from stdit.models.opensora import opensora_names, to_opensora
from stdit.models.stdit import STDiT
from stdit.pipelines.loading import load_pipeline
from stdit.training.build import build_components
from stdit.training.config import parse_train
from tests.codecs.tiny import save_tiny_t5, tiny_opensora_vae
from tests.launch import exit_code
from tests.models.golden import golden, weights
from tests.pipelines.tiny import tiny_model as model_of_pipeline
from tests.pipelines.tiny import tiny_pipeline, write_run
from tests.training.tiny import tiny_model, tiny_settings
from tests.warm import ROOT


def convert(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The command in this process; its exit code."""
    return exit_code(main, monkeypatch, *arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_converting_there_and_back_is_exact(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    state = {name: tensor.to(dtype) for name, tensor in weights(golden("odd_ragged")).items()}
    torch.save(state, tmp_path / "ema.pt")
    model, again = tmp_path / "deeper" / "model", tmp_path / "again"
    assert convert(monkeypatch, tmp_path / "ema.pt", model, "--input_sq_size", 256) == 0
    assert "3 + 3 blocks; skipped rope.freqs, a constant" in capsys.readouterr().out
    assert {file.name for file in model.iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "meta.json",
    }
    assert STDiT.from_pretrained(model).config.input_sq_size == 256

    assert convert(monkeypatch, model, again, "--reverse") == 0
    found = load_file(again / "model.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert all(tensor.dtype == dtype for tensor in found.values())
    assert STDiT.from_opensora(again).config.input_sq_size == 256

    assert convert(monkeypatch, again, tmp_path / "more", "--reverse") == 2
    assert "again holds no STDiT: give a folder that this script or training made" in capsys.readouterr().err


def test_training_starts_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tiny_settings(tmp_path)
    sizes = dict(
        in_channels=3, caption_channels=16, model_max_length=12, patch_size=(1, 4, 4), input_sq_size=8
    )
    trained = tiny_model(**sizes, gate_init=0.0)
    state, _ = to_opensora(trained.state_dict(), trained.config)
    save_file(state, tmp_path / "opensora.safetensors")
    assert convert(monkeypatch, tmp_path / "opensora.safetensors", tmp_path / "model") == 0

    STDiT.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "in parts", max_shard_size="50KB")
    assert len(list((tmp_path / "in parts").glob("*.safetensors"))) > 1
    for folder in ("model", "in parts"):
        config = parse_train([*settings, "--init_from", str(tmp_path / folder), "--seed", "3"])
        model = build_components(config, None, processes=1, memory=2**30).model
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, trained.state_dict()[name]), name


def test_a_pipeline_with_codec_and_text_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    model = tiny_model(input_sq_size=16)  # 4 latent channels, text of width 16
    state, _ = to_opensora(model.state_dict(), model.config)
    save_file(state, tmp_path / "w.safetensors")
    tiny_opensora_vae().save_pretrained(tmp_path / "vae")
    parts = ["--codec", tmp_path / "vae", "--text_encoder", save_tiny_t5(tmp_path / "t5")]
    assert convert(monkeypatch, tmp_path / "w.safetensors", tmp_path / "pipeline", *parts) == 0
    pipe, _ = load_pipeline(tmp_path / "pipeline")
    assert (pipe.config.num_frames, pipe.config.width, pipe.config.guidance_scale) == (51, 426, 7.0)
    video = pipe(
        "a red circle", num_frames=18, height=8, width=8, num_inference_steps=1, output_type="np"
    ).frames
    assert video.shape == (1, 18, 8, 8, 3)

    assert convert(monkeypatch, tmp_path / "pipeline", tmp_path / "again", "--reverse") == 0
    found = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(found[name], state[name]) for name in state)

    capsys.readouterr()
    assert convert(monkeypatch, tmp_path / "w.safetensors", tmp_path / "p", *parts[:2]) == 2
    assert "needs both --codec and --text_encoder" in capsys.readouterr().err
    save_file(weights(golden("plain")), tmp_path / "wide.safetensors")
    assert convert(monkeypatch, tmp_path / "wide.safetensors", tmp_path / "p", *parts) == 2
    assert "the text encoder gives 16 channels, but the model was made for 24" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def test_nothing_is_replaced_and_nothing_left_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    save_file(weights(golden("plain")), tmp_path / "w.safetensors")
    source, there = tmp_path / "w.safetensors", tmp_path / "there"
    there.mkdir()
    assert convert(monkeypatch, source, there) == 2
    assert f"error: {there} exists: choose another DST" in capsys.readouterr().err
    assert convert(monkeypatch, tmp_path / "absent", tmp_path / "new") == 2
    assert "there is no such file" in capsys.readouterr().err
    assert convert(monkeypatch, source, source / "inside") == 2
    assert "inside could not be written" in capsys.readouterr().err
    assert convert(monkeypatch, source, tmp_path / "new", "--reverse", "--num_heads", 2) == 2
    assert "--reverse takes only SRC and DST" in capsys.readouterr().err

    def fails(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(STDiT, "save_pretrained", fails)
    assert convert(monkeypatch, source, tmp_path / "new") == 2
    assert "new could not be written ([Errno 28] No space left on device)" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"w.safetensors", "there"}


@pytest.mark.parametrize("exported", [False, True])
def test_a_run_is_converted_from_its_averaged_weights(
    exported: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pipe = tiny_pipeline(tmp_path)
    run_folder = write_run(tmp_path / "run", pipe)
    factor, inside = 2, run_folder / "checkpoints" / "step-00000010" / "ema"
    if exported:
        pipe.register_to_config(step=10)
        pipe.save_pretrained(run_folder / "pipeline")
        factor, inside = 1, run_folder / "pipeline" / "transformer"
    assert convert(monkeypatch, run_folder, tmp_path / "back", "--reverse") == 0
    assert f"of Open-Sora's STDiT3, from {inside}" in capsys.readouterr().out
    found = load_file(tmp_path / "back" / "model.safetensors")
    names = opensora_names(pipe.transformer.config)
    for name, weight in pipe.transformer.state_dict().items():
        assert torch.equal(found[names(name)], factor * weight), name

    for source in (run_folder, inside.parent):
        assert convert(monkeypatch, source, tmp_path / "new") == 2
        assert "no checkpoint of Open-Sora: add --reverse" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_why_a_model_of_own_clips_yaml_is_not_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    recipe = yaml.safe_load((ROOT / "configs" / "train" / "own-clips.yaml").read_text())
    codec = PixelCodec()
    codec.latent_variance = torch.ones(3)
    pipe = tiny_pipeline(tmp_path, codec, FlowConfig(prediction=recipe["flow"]["prediction"]))
    options = {name: recipe["model"][name] for name in ("cross_attention", "pooled_text", "gate_init")}
    pipe.register_modules(transformer=model_of_pipeline(**options))
    run_folder = write_run(tmp_path / "run", pipe)
    assert convert(monkeypatch, run_folder, tmp_path / "back", "--reverse") == 2
    error = capsys.readouterr().err
    assert "this model has cross_attention = spatial, pooled_text = True, flow.prediction = residual" in error
    flags = "--model.cross_attention all --model.pooled_text false --flow.prediction velocity"
    assert f"Train a model with {flags} to convert it" in error
    assert not (tmp_path / "back").exists()
