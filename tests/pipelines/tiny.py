"""A tiny STDiTPipeline with random weights, none of which is zero, and a run folder around it."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from stdit.checkpoint_files import publish, write_manifest
from stdit.codecs import build_text_encoder
from stdit.codecs.config import TextEncoderConfig
from stdit.codecs.pixel import PixelCodec
from stdit.codecs.text import TextEncoder
from stdit.diffusion.config import FlowConfig
from stdit.diffusion.scheduler import RectifiedFlow
from stdit.models.config import STDiTConfig
from stdit.models.stdit import STDiT
from stdit.pipelines.pipeline import STDiTPipeline
from tests.codecs.tiny import save_tiny_bert

SIZE = dict(num_frames=4, height=8, width=8)


def tiny_text_encoder(folder: Path) -> TextEncoder:
    return build_text_encoder(TextEncoderConfig(name="auto", path=str(save_tiny_bert(folder))))


def tiny_model(in_channels: int = 3, seed: int = 0, **settings: Any) -> STDiT:
    config = STDiTConfig(
        **(dict(depth=2, hidden_size=16, num_heads=2, patch_size=(1, 4, 4), pred_sigma=False) | settings),
        in_channels=in_channels,
        caption_channels=16,
        model_max_length=128,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = STDiT(**asdict(config)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def tiny_pipeline(folder: Path, codec: Any = None, flow: FlowConfig | None = None) -> STDiTPipeline:
    codec = codec if codec is not None else PixelCodec()
    pipe = STDiTPipeline(
        transformer=tiny_model(codec.channels),
        vae=codec,
        text_encoder=tiny_text_encoder(folder / "tiny_bert"),
        tokenizer=None,
        scheduler=RectifiedFlow(),
        flow=flow,
        num_inference_steps=3,
        guidance_scale=2.0,
        fps=8.0,
        **SIZE,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_run(run: Path, pipe: STDiTPipeline, steps: tuple[int, ...] = (10,), **recorded: Any) -> Path:
    """A run folder as training leaves it: the averaged weights of each checkpoint are the model's doubled.

    Args:
        recorded: settings that the checkpoints record for their pipeline.
    """
    from safetensors.torch import save_file

    run.mkdir(parents=True)
    (run / "config.yaml").write_text("name: tiny\n")
    pipe.codec.save_pretrained(run / "codec")
    pipe.prompt_encoder.save_pretrained(run / "text_encoder")
    for step in steps:
        aside = run / "checkpoints" / f"step-{step:08d}.tmp"
        pipe.transformer.save_pretrained(aside / "model")
        averaged = {name: 2 * value for name, value in pipe.transformer.state_dict().items()}
        (aside / "ema").mkdir()
        save_file(averaged, aside / "ema" / "ema.safetensors")
        settings = {"config": {"flow": asdict(pipe.flow.config)}, "pipeline": {**SIZE, **recorded}}
        settings["pipeline"] = {"num_inference_steps": 3, **settings["pipeline"]}
        write_manifest(aside, {"step": step, **settings})
        publish(aside, aside.with_suffix(""))
    return run


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to rounding: MKL may round a product of one row otherwise for weights at another alignment.

    Weights that are read from a file, or come back from a disk, lie at another address than those that were drawn.
    """
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
