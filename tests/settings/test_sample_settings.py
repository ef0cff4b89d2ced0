"""Every setting of sample.py and of a pipeline call changes what comes out, or is refused."""

import hashlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import sample
from stdit.codecs.stored_text import store_text
from stdit.errors import UserError
from stdit.models.stdit import STDiT
from stdit.pipelines.conditions import FrameCondition, warn_once
from stdit.pipelines.config import SampleConfig
from stdit.pipelines.pipeline import STDiTPipeline
from stdit.pipelines.video_io import write_mp4
from stdit.pipelines.writer import VideoWriter
from tests.lora.tiny import write_random_adapter
from tests.pipelines.tiny import SIZE, tiny_pipeline, write_run
from tests.settings.observe import (
    Change,
    Outcome,
    change_of,
    check_observed,
    leaves,
    outcome_of_call,
    recorded,
)

SEGMENTS = ("--segments", "2")
INTERVAL = ("--guidance_schedule", "interval")
CHANGES = {
    "height": Change(["--height", "16", "--width", "8"]),
    "width": Change(["--height", "8", "--width", "16"]),
    "num_frames": Change(["--num_frames", "6"]),
    "num_inference_steps": Change(["--num_inference_steps", "3"]),
    "solver": Change(["--solver", "heun"]),
    "cache": Change(["--cache", "0.5"], ["--num_inference_steps", "8"]),
    "pab": Change(["--pab", "[2, 2, 2]"], ["--num_inference_steps", "8"]),
    "pab_timesteps": Change(
        ["--pab_timesteps", "[100, 900]"], ["--num_inference_steps", "8", "--pab", "[2, 2, 2]"]
    ),
    "guidance_schedule": Change(["--guidance_schedule", "linear"]),
    "guidance_interval": Change(["--guidance_interval", "[0.2, 0.4]"], INTERVAL),
    "refine_pairs": Change(["--refine_pairs", "1"]),
    "refine_level": Change(["--refine_level", "0.2"], ["--refine_pairs", "1"]),
    "refine_guidance_scale": Change(["--refine_guidance_scale", "2"], ["--refine_pairs", "1"]),
    "negative_prompt": Change(["--negative_prompt", "a square"]),
    "image": Change(["--image", "red.png"]),
    "condition": Change(["--condition", "red.png@1"]),
    "lora": Change(["--lora", "adapter.safetensors:0.5"]),
    "lora_other_base": Change(["--lora_other_base"], ["--lora", "adapter.safetensors"]),
    "reference_path": Change(["--reference_path", "clip.mp4"], ["--mask_strategy", "0"]),
    "mask_strategy": Change(["--mask_strategy", "0"], ["--reference_path", "red.png"]),
    "segment_prompts": Change(["--segment_prompts", "b"]),
    "segments": Change(["--segments", "2"]),
    "overlap": Change(["--overlap", "2"], SEGMENTS),
    "loop": Change(["--loop"], SEGMENTS),
    "checkpoint": Change(["--checkpoint", "other"]),
    "imports": Change(["--import", "no_such_module"]),
    "prompt": Change(["--prompt", "another"]),
    "prompts": Change(["--prompts", "prompts.txt"]),
    "camera": Change(["--camera", "pan left"]),
    "resolution": Change(["--resolution", "16", "--aspect_ratio", "1:1"]),
    "aspect_ratio": Change(["--aspect_ratio", "2:1"], ["--resolution", "16", "--aspect_ratio", "1:1"]),
    "seeds": Change(["--seeds", "[3, 4]"]),
    "output": Change(["--output", "elsewhere"]),
    "format": Change(["--format", "gif"]),
    "batch_size": Change(["--batch_size", "1"], ["--num_samples", "2"]),
    "text_states": Change(["--text_states", "states"]),
    "device": Change(["--device", "cpu"]),
    "codec.tile": Change(["--codec.tile", "128"], ["--height", "132", "--width", "128"]),
    "dry_run": Change(["--dry_run"]),
    "parallel.sp": Change(["--parallel.sp", "2"]),
    "parallel.grid": Change(["--parallel.grid", "[1, 2]"]),
    "parallel.memory_gib": Change(["--parallel.memory_gib", "1e-9"], ["--parallel.sp", "auto"]),
}
CALLS = {
    "stdit.parallel.processes.device.join_processes": None,
    "stdit.pipelines.sampling.load_pipeline": None,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with two runs, pictures, prompts and stored text states, which is the current one."""
    folder = tmp_path_factory.mktemp("settings")
    pipe = tiny_pipeline(folder)
    write_run(folder / "run", pipe)
    write_run(folder / "other", pipe, steps=(20,))
    PIL.Image.new("RGB", (8, 8), "red").save(folder / "red.png")
    write_mp4(folder / "clip.mp4", np.full((4, 8, 8, 3), 77, np.uint8), fps=8)
    (folder / "prompts.txt").write_text("another\n")
    list(store_text(pipe.prompt_encoder, ["a"], folder / "states"))
    write_random_adapter(folder / "adapter.safetensors", pipe.transformer, "of another base")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture
def outcome_of(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> Callable[[Sequence[str]], Outcome]:
    def run(flags: Sequence[str]) -> Outcome:
        frames, calls, out = dict[str, str](), list[str](), tmp_path / str(len(list(tmp_path.iterdir())))

        class Writer(VideoWriter):
            def write(self, videos: Any) -> None:
                for request, pixels, _ in (videos := list(videos)):
                    digest = hashlib.md5(pixels.tobytes() + repr(pixels.shape).encode()).hexdigest()
                    frames[f"video {request.index} {request.seed}"] = f"{request.prompt}: {digest}"
                super().write(videos)

        original = STDiTPipeline.__call__

        def call(pipe: STDiTPipeline, prompt: Any = None, **options: Any) -> Any:
            calls.append(f"{len(prompt or ())} prompts")
            return original(pipe, prompt, **options)

        argv = ["sample.py", "--checkpoint", "run", "--num_inference_steps", "2", "--output", str(out)]
        argv += [] if "--prompts" in flags else ["--prompt", "a"]
        caplog.clear()
        warn_once.cache_clear()
        with pytest.MonkeyPatch.context() as patch, recorded(CALLS, calls):
            patch.setattr(sys, "argv", [*argv, *flags])
            patch.setattr("stdit.pipelines.sampling.VideoWriter", Writer)
            patch.setattr(STDiTPipeline, "__call__", call)
            patch.setattr(STDiT, "compile_blocks", partialmethod(STDiT.compile_blocks, backend="eager"))
            found = outcome_of_call(lambda: sample.main() or {})
        printed = capsys.readouterr().out.replace(str(out), "OUT")
        return {**found, **frames, "printed": printed, "log": caplog.text, "calls": "\n".join(calls)}

    return run


@pytest.mark.parametrize(("key", "hint", "default"), leaves(SampleConfig), ids=lambda value: str(value)[:20])
def test_every_setting_of_sample_changes_something(
    key: str, hint: Any, default: Any, outcome_of: Callable[[Sequence[str]], Outcome]
) -> None:
    check_observed(key, change_of(key, hint, default, CHANGES), outcome_of)


def test_the_same_command_gives_the_same_outcome(outcome_of: Callable[[Sequence[str]], Outcome]) -> None:
    """Otherwise any setting would seem to change it."""
    assert outcome_of(()) == outcome_of(()) and outcome_of(SEGMENTS) == outcome_of(SEGMENTS)


STATES = {"prompt": None, "prompt_embeds": torch.arange(32.0).view(1, 2, 16) / 32}
ARGUMENTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "prompt": ({"prompt": "b"}, {}),
    "negative_prompt": ({"negative_prompt": "b"}, {}),
    "num_videos_per_prompt": ({"num_videos_per_prompt": 2}, {}),
    "generator": ({"generator": 1}, {}),
    "latents": ({"latents": torch.zeros(1, 3, 4, 8, 8)}, {}),
    "prompt_embeds": (STATES, {}),
    "prompt_attention_mask": ({"prompt_attention_mask": torch.tensor([[1, 0]])}, STATES),
    "negative_prompt_embeds": ({"negative_prompt_embeds": torch.ones(1, 2, 16)}, {}),
    "negative_prompt_attention_mask": (
        {"negative_prompt_attention_mask": torch.tensor([[1, 0]])},
        {"negative_prompt_embeds": STATES["prompt_embeds"]},
    ),
    "image": ({"image": torch.zeros(3, 8, 8)}, {}),
    "conditions": ({"conditions": [FrameCondition(torch.zeros(3, 8, 8), 1)]}, {}),
    "output_type": ({"output_type": "np"}, {}),
    "return_dict": ({"return_dict": False}, {}),
    "attention_kwargs": ({"attention_kwargs": {"scale": 0.5}}, {}),
    "callback_on_step_end": ({"callback_on_step_end": print}, {}),
    "callback_on_step_end_tensor_inputs": (
        {"callback_on_step_end_tensor_inputs": ()},
        {"callback_on_step_end": print},
    ),
    "callback_on_pair_end": ({"callback_on_pair_end": print}, {"refine_pairs": 1}),
    "max_sequence_length": ({"max_sequence_length": 2}, {"prompt": "a red circle"}),
    "num_frames": ({"num_frames": 5}, {}),
    "height": ({"height": 12, "width": 8}, {}),
    "width": ({"height": 8, "width": 12}, {}),
    "fps": ({"fps": 4.0}, {}),
    "num_inference_steps": ({"num_inference_steps": 1}, {}),
    "solver": ({"solver": "heun"}, {}),
    "cache": ({"cache": 0.5}, {"num_inference_steps": 8}),
    "pab": ({"pab": [2, 2, 2]}, {"num_inference_steps": 8}),
    "pab_timesteps": ({"pab_timesteps": (100, 900)}, {"num_inference_steps": 8, "pab": [2, 2, 2]}),
    "guidance_scale": ({"guidance_scale": 4.0}, {}),
    "guidance_schedule": ({"guidance_schedule": "linear"}, {}),
    "guidance_interval": ({"guidance_interval": (0.2, 0.4)}, {"guidance_schedule": "interval"}),
    "guidance_rescale": ({"guidance_rescale": 0.7}, {}),
    "shift": ({"shift": 3.0}, {}),
    "refine_pairs": ({"refine_pairs": 1}, {}),
    "refine_level": ({"refine_level": 0.2}, {"refine_pairs": 1}),
    "refine_guidance_scale": ({"refine_guidance_scale": 2.0}, {"refine_pairs": 1}),
}


@pytest.mark.parametrize("name", [name for name in inspect.signature(STDiTPipeline.__call__).parameters][1:])
def test_every_argument_of_a_call_changes_something(name: str, pipe: STDiTPipeline) -> None:
    def outcome(**options: Any) -> list[str]:
        seen: list[str] = []
        if "callback_on_step_end" in options:
            options["callback_on_step_end"] = lambda pipe, step, timestep, tensors: seen.append(
                f"{tensors.keys()}"
            )
        if "callback_on_pair_end" in options:
            options["callback_on_pair_end"] = lambda pipe, pair, clean_latents: seen.append(f"pair {pair}")
        generator = torch.Generator().manual_seed(options.pop("generator", 0))
        arguments = {"prompt": "a", "num_inference_steps": 2, **SIZE, **options}
        try:
            result = pipe(generator=generator, **arguments)
        except UserError as error:
            return [str(error)]
        frames = result[0]
        pixels = frames if isinstance(frames, np.ndarray) else np.stack([np.array(one) for one in frames[0]])
        seen += [f"{len(frames)}", f"{pipe.attention_kwargs}"]
        return [*seen, type(result).__name__, type(frames).__name__, f"{pixels.shape}", str(pixels.tobytes())]

    changed, beside = ARGUMENTS[name]
    assert outcome(**beside) != outcome(**beside, **changed), f"{name} is ignored"


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> STDiTPipeline:
    return tiny_pipeline(tmp_path_factory.mktemp("pipe"))
