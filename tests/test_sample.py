"""sample.py, in processes of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stdit.pipelines.video_io import write_mp4
from tests import warm
from tests.pipelines.tiny import tiny_pipeline, write_run

ROOT = Path(__file__).parents[1]


def sample(*arguments, folder):
    return warm.run([str(ROOT / "sample.py"), *map(str, arguments)], cwd=folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    return write_run(folder / "outputs" / "tiny", tiny_pipeline(folder))


def test_prompt_to_video(run, tmp_path):
    (tmp_path / "c.yaml").write_text(f"checkpoint: {run}\nnum_inference_steps: 2\nfps: 4\nformat: mp4\n")
    result = sample(
        "--config",
        "c.yaml",
        "--prompt",
        "a red circle",
        "--fps",
        6,
        "--output",
        tmp_path / "out",
        folder=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["000-a-red-circle-seed0.json", "000-a-red-circle-seed0.mp4"]
    values = json.loads((tmp_path / "out" / names[0]).read_text())
    assert (values["num_inference_steps"], values["fps"]) == (2, 6.0)
    assert str(tmp_path / "out" / names[1]) in result.stdout
    assert "Traceback" not in result.stderr


def test_list_sizes(run, tmp_path):
    result = sample("--checkpoint", run, "--list_sizes", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "428x240" in result.stdout and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompt", "a", "--guidance_scal", "2"], "guidance_scale"),
        (["--prompt", "a", "--num_frames", "many"], "num_frames"),
        (["--prompt", "a", "--num_frames", "0"], "num_frames = 0"),
        (["--prompts", "absent.txt"], "absent.txt"),
        (["--prompt", "a", "--checkpoint", "absent"], "absent"),
        (["--prompt", "a", "--image", "absent.png"], "absent.png"),
        (["--prompt", "a", "--condition", "absent.png@0"], "absent.png"),
        (["--prompt", "a", "--condition", "a.png"], "FILE@frame"),
        (
            ["--prompt", "a", "--num_frames", "8", "--condition", "a.png@0", "--condition", "a.png@8"],
            "a.png@8",
        ),
        (["--prompt", "a", "--format", "avi"], "format"),
        (["--prompt", "a", "--checkpoint", ""], "no checkpoint"),
        (["--list_sizes", "--checkpoint="], "no checkpoint"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(tmp_path, arguments, message):
    result = sample(*arguments, folder=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_help_names_every_setting_and_imports_no_torch(tmp_path):
    program = (
        "import sys, runpy\n"
        "sys.argv = ['sample.py', '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / 'sample.py')!r}, run_name='__main__')\n"
        "except SystemExit as exit:\n"
        "    assert exit.code == 0\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'accelerate', 'wandb'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr
    for flag in (
        "--checkpoint",
        "--prompts",
        "--num_frames",
        "--guidance_scale",
        "--image",
        "--aspect_ratio",
    ):
        assert flag in result.stdout


def test_a_prompt_that_is_given_twice_makes_two_videos(run, tmp_path):
    argv = ["--prompt", "a red ball", "--prompt", "[a, b]", "--prompt=- c", "--num_inference_steps", 1]
    result = sample("--checkpoint", run, *argv, "--format", "mp4", "--output", "out", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    texts = [json.loads(path.read_text())["prompt"] for path in sorted((tmp_path / "out").glob("*.json"))]
    assert texts == ["a red ball", "[a, b]", "- c"]
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 3


def test_what_overwrites_or_is_left_out_is_said(run, tmp_path):
    """A video as --image, and two conditions for one frame."""
    write_mp4(tmp_path / "clip.mp4", np.zeros((4, 8, 8, 3), np.uint8), fps=8)
    conditions = ["--image", "clip.mp4", "--condition", "clip.mp4@0:2", "--condition", "clip.mp4@1:1"]
    argv = ["--checkpoint", run, "--prompt", "a", *conditions, "--num_inference_steps", 1, "--output", "out"]
    result = sample(*argv, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("image clip.mp4: a video of 4 frames, of which the first is used") == 1
    assert result.stderr.count("clip.mp4@0:2:1 overwrites frame 0 of condition clip.mp4@0:1:1") == 1
    assert result.stderr.count("clip.mp4@1:1:1 overwrites frame 1 of condition clip.mp4@0:2:1") == 1
    assert result.stderr.count("the later one wins") == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--guidance_scale", "1", "--negative_prompt", "blur"],
            "negative_prompt = 'blur' would have no effect",
        ),
        (
            ["--guidance_scale", "1", "--guidance_rescale", "0.7"],
            "guidance_rescale = 0.7 would have no effect",
        ),
        (["--guidance_scale", "1", "--guidance_schedule", "linear"], "guidance_scale = 1 is no guidance"),
        (["--overlap", "2"], "overlap = 2 is shared by two segments: add segments = 2"),
        (["--seeds", "[1, 2]", "--seed", "3"], "both seeds and seed are set"),
        (["--seeds", "[1, 2]", "--num_samples", "3"], "both seeds and num_samples are set"),
        (["--image", "fifo"], "conditioning frames fifo: a folder, pipe or device"),
        (["--config", "fifo"], "--config fifo: is a folder, pipe or device"),
    ],
)
def test_a_setting_without_effect_is_an_error(run, tmp_path, arguments, message):
    os.mkfifo(tmp_path / "fifo")
    result = sample("--checkpoint", run, "--prompt", "a", *arguments, folder=tmp_path)
    assert result.returncode == 2 and message in result.stderr, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["fifo"]


def test_weights_that_a_pipeline_does_not_have_are_not_replaced_by_others(run, tmp_path):
    """--ema false takes the checkpoint of a run with a pipeline, and refuses a pipeline."""
    export = tiny_pipeline(tmp_path)
    export.register_to_config(step=10)
    export.save_pretrained(run / "pipeline")
    try:
        argv = ["--prompt", "a", "--num_inference_steps", 1, "--ema", "false", "--format", "mp4"]
        own = sample("--checkpoint", run, *argv, "--output", "out", folder=tmp_path)
        assert own.returncode == 0 and "checkpoints/step-00000010" in own.stdout, own.stderr
        refused = sample("--checkpoint", run / "pipeline", *argv, folder=tmp_path)
        assert refused.returncode == 2 and "whose only weights are the averaged ones" in refused.stderr
    finally:
        shutil.rmtree(run / "pipeline")
