"""CONTRIBUTING's recipes: a user's module adds a codec, an optimizer and so on, then trains and samples."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

import sample
import train
from scripts import encode_text
from stdit.codecs import CODECS, TEXT_ENCODERS
from stdit.codecs.stored_text import StoredTextEncoder
from stdit.codecs.vaes import VAES
from stdit.diffusion.conditioning import MASK_STRATEGIES
from stdit.diffusion.config import PREDICTIONS
from stdit.errors import UserError
from stdit.pipelines.loading import load_pipeline
from stdit.training.config import OPTIMIZERS
from tests.training.tiny import tiny_settings

CODEC = '''
from einops import rearrange

from stdit.codecs import VideoCodec, register_codec


class Unshuffle(VideoCodec):
    """The pixels of 1 x 2 x 2 blocks as channels."""

    name, stride, channels, independent_frames = "unshuffle", (1, 2, 2), 12, True

    def _encode(self, video):
        return rearrange(video, "b c t (h p) (w q) -> b (c p q) t h w", p=2, q=2)

    def _decode(self, latents):
        return rearrange(latents, "b (c p q) t h w -> b c t (h p) (w q)", p=2, q=2)


register_codec("unshuffle", Unshuffle)
'''
VAE = """
from stdit.codecs import VAEFacts, register_diffusers_vae

register_diffusers_vae("AutoencoderKLQwenImage", VAEFacts(stride=lambda vae: (4, 8, 8)))
"""
TEXT_ENCODER = '''
import torch

from stdit.codecs import TextEncoder, register_text_encoder


class Letters(TextEncoder):
    """One token per letter."""

    name, channels, max_length = "letters", 32, 50

    def encode(self, texts):
        if not texts:
            raise ValueError("at least one text")
        codes = [[ord(letter) % 32 for letter in text[: self.max_length] or " "] for text in texts]
        mask = torch.zeros(len(codes), max(map(len, codes)), dtype=torch.bool, device=self.device)
        states = torch.zeros(*mask.shape, self.channels, device=self.device)
        for row, code in enumerate(codes):
            mask[row, : len(code)] = True
            states[row, range(len(code)), code] = 1.0
        return states, mask


register_text_encoder("letters", Letters)
'''
OPTIMIZER = """
import torch

from stdit.training.optim import register_optimizer

register_optimizer("sgd", lambda model, config: torch.optim.SGD(model.parameters(), config.lr, momentum=0.9))
"""
MASK_STRATEGY = '''
import torch

from stdit.diffusion import register_mask_strategy


def ends(frames, generator):
    """First and last frame, in videos of three or more."""
    mask = torch.zeros(frames, dtype=torch.bool)
    mask[[0, -1]] = frames > 2
    return mask


register_mask_strategy("ends", ends)
'''
PREDICTION = '''
from stdit.diffusion import register_prediction


def noise(flow, output, x_t, t):
    """The output is the noise: v = (x_t - eps) / (1 - t)."""
    return (x_t - output) / (1 - t).clamp(min=0.05)[:, None, :, None, None]


register_prediction("noise", noise)
'''
RECIPES: dict[str, tuple[str, list[str]]] = {
    "codec": (CODEC, ["--codec.name", "unshuffle"]),
    "vae": (
        VAE,
        ["--codec.name", "AutoencoderKLQwenImage", "--codec.path", "vae", "--model.patch_size", "[1, 1, 1]"],
    ),
    "text_encoder": (TEXT_ENCODER, ["--text_encoder.name", "letters", "--text_encoder.path", "null"]),
    "optimizer": (OPTIMIZER, ["--optimizer.name", "sgd"]),
    "mask_strategy": (MASK_STRATEGY, ["--flow.conditioning", "{ends: 0.5}"]),
    "prediction": (PREDICTION, ["--flow.prediction", "noise"]),
}
IN_CHECKPOINT = ("codec", "vae", "text_encoder", "prediction")
"""Recipes that sampling needs, too."""


def forget_modules() -> None:
    """Remove registered names, as in a new process."""
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]
    for registry in (CODECS, TEXT_ENCODERS, OPTIMIZERS, MASK_STRATEGIES, PREDICTIONS):
        for name in [name for name in registry.names() if name in OURS]:  # type: ignore[attr-defined]
            del registry._entries[name]  # type: ignore[attr-defined]
    VAES.pop("AutoencoderKLQwenImage", None)


OURS = {"unshuffle", "AutoencoderKLQwenImage", "letters", "sgd", "ends", "noise"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the current folder, which holds the modules of the recipes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    forget_modules()


def call(main, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    AcceleratorState._reset_state(True)
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    assert not main()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_users_module_trains_and_samples(
    recipe: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, flags = RECIPES[recipe]
    module = f"my_{recipe}"
    (folder / f"{module}.py").write_text(source)
    if recipe == "vae":
        from diffusers import AutoencoderKLQwenImage

        torch.manual_seed(0)
        sizes = dict(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
        numbers = dict(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
        AutoencoderKLQwenImage(**sizes, **numbers).save_pretrained(folder / "vae")
    settings = [*tiny_settings(folder), "--trainer.steps", "2", *flags]
    run = folder / "outputs" / "tiny"

    with pytest.raises(UserError, match=r"must be one of .*--import MODULE"):
        call(train.main, monkeypatch, *settings)
    call(train.main, monkeypatch, *settings, "--import", module)
    assert (run / "config.yaml").read_text().count(f"imports:\n- {module}\n") == 1
    wanted = ["--checkpoint", run, "--prompt", "a red square", "--num_inference_steps", 2, "--output"]
    forget_modules()
    if recipe in IN_CHECKPOINT:
        for checkpoint in (run, next((run / "checkpoints").iterdir())):
            with pytest.raises(UserError, match=f"It was made with --import {module}: add it"):
                load_pipeline(checkpoint)
        assert module not in sys.modules
        call(sample.main, monkeypatch, *wanted, folder / "out", "--import", module)
    else:
        call(sample.main, monkeypatch, *wanted, folder / "out")
    assert len(list((folder / "out").glob("*.mp4"))) == 1


def test_states_of_a_users_text_encoder_are_stored(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "my_letters.py").write_text(TEXT_ENCODER)
    (folder / "prompts.txt").write_text("a red ball\n")
    flags = ["--output", "text", "--captions", "prompts.txt", "--text_encoder.name", "letters"]
    flags += ["--text_encoder.path", "null"]
    with pytest.raises(UserError, match=r"must be one of .*--import MODULE"):
        call(encode_text.main, monkeypatch, *flags)
    call(encode_text.main, monkeypatch, *flags, "--import", "my_letters")
    states, mask = StoredTextEncoder("text").encode(["a red ball"])
    assert states.shape == (1, len("a red ball"), 32) and mask.all()


def test_a_file_that_names_modules_imports_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "my_trap.py").write_text("open('mark', 'w')\n")
    (folder / "config.yaml").write_text("imports: [my_trap]\nname: trap\n")
    for main in (train.main, sample.main):
        with pytest.raises(UserError, match="was made with --import my_trap.* add --import my_trap"):
            call(main, monkeypatch, "--config", "config.yaml")
    assert not (folder / "mark").exists()


def test_a_module_that_is_missing_or_raises_is_one_clear_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "my_broken.py").write_text("import json\n\n1 / 0\n")
    (folder / "my_lacking.py").write_text("import nothing_of_this_name\n")
    for arguments, message in {
        ("--import", "my_absent"): "--import my_absent: there is no such module",
        ("--import=my_broken",): "--import my_broken: importing it raises ZeroDivisionError",
        ("--import", "my_lacking"): "--import my_lacking: importing it raises ModuleNotFoundError",
        ("--import", "my_broken.py"): "--import my_broken.py: must be the name of a module",
        ("--import", "--dry_run"): "must be the name of a module",
        ("--imports", "json"): "did you mean --import MODULE",
    }.items():
        with pytest.raises(UserError, match=message):
            call(train.main, monkeypatch, *arguments)
