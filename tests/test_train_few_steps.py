"""train.py with distill.steps: a student that makes a video in a few steps, from the run to its pipeline."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from stdit.checkpoint_files import read_meta
from stdit.errors import UserError
from stdit.pipelines.config import SampleConfig
from stdit.pipelines.loading import load_pipeline
from stdit.pipelines.sampling import sample_to_files
from stdit.pipelines.video_io import read_metadata
from tests.test_resume_changed import kill_in
from tests.test_train import do, metrics, same_state, settings_like, train_two
from tests.training.tiny import tiny_settings

FEW = ["--name", "few", "--distill.guidance_scale", "[1, 2]", "--distill.steps", "[1, 2, 4]"]
FEW += ["--trainer.steps", "4", "--flow.conditioning", "{first: 0.5}"]
LAST = "step-00000004"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with clips, a run of two steps, and one of its few-step student of four."""
    return train_two(tmp_path_factory.mktemp("trained"), FEW)


@pytest.fixture
def again(trained: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Settings of another run like it, in a folder of its own."""
    return settings_like(trained, tmp_path, FEW)


def sample(source: Path, output: Path, **settings: Any) -> dict[str, Any]:
    """Sample a video, and return its metadata."""
    config = SampleConfig(checkpoint=str(source), prompt=["a red square"], output=str(output), **settings)
    found = next(path for path in sample_to_files(config) if path.suffix == ".json")
    return json.loads(found.read_text())


def test_the_pipeline_knows_its_steps(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = trained / "outputs" / "few"
    for source in (run, run / "pipeline"):
        found = sample(source, tmp_path / source.name)
        assert found["num_inference_steps"] == found["model_calls"] == 4
        sample(source, tmp_path / f"{source.name}2", num_inference_steps=2)
    assert "num_inference_steps" not in caplog.text
    with caplog.at_level(logging.WARNING):
        found = sample(run, tmp_path / "more", num_inference_steps=30, solver="heun")
    assert found["num_inference_steps"] == 30
    assert "num_inference_steps = 30: the model learned to make a video in 1, 2, 4 steps" in caplog.text
    assert "solver = heun: the model learned to sample with euler" in caplog.text


def test_validation_videos_show_each_number_of_steps(trained: Path) -> None:
    run = trained / "outputs" / "few"
    files = sorted((run / "samples" / LAST).glob("*.mp4"))
    assert [path.name for path in files] == [f"00-a-red-square-{steps}-steps.mp4" for steps in (1, 2, 4)]
    assert [read_metadata(path)["num_inference_steps"] for path in files] == [1, 2, 4]
    assert len({path.read_bytes() for path in files}) == 3
    assert (run / "samples" / LAST / "sheet.png").exists()


def test_score_and_student_are_saved_and_a_killed_run_resumes_to_the_same_bits(
    trained: Path, again: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        kill_in(patch, 3)
        do(again())
    assert do(again()) == 0
    one, other = (folder / "outputs" / "few" / "checkpoints" / LAST for folder in (trained, tmp_path))
    assert same_state(one, other)
    files = set(read_meta(one)["files"])
    assert {
        "score/model/diffusion_pytorch_model.safetensors",
        "score/optimizer/optimizer.safetensors",
    } <= files
    assert not any(name.startswith("score/ema") for name in files)
    for name in sorted(name for name in files if name.startswith("score/")):
        first, second = (load_file(folder / name) for folder in (one, other))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), name
    lines = metrics(trained / "outputs" / "few")
    assert all(line["score_loss"] > 0 for line in lines if "loss" in line)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--distill.steps", "[4, 2]"], r"distill.steps = \[4, 2\]: must be rising numbers of steps from 1"),
        (["--distill.steps", "[0]"], r"distill.steps = \[0\]: must be rising numbers"),
        (["--distill.guidance_scale", "null"], r"distill.steps = \[1, 2, 4\]: .* needs guidance scales"),
        (["--distill.score_updates", "0"], "distill.score_updates = 0: must be at least 1"),
        (["--distill.score_lr", "0"], "distill.score_lr = 0.*: must be above 0"),
        (
            ["--distill.steps", "[65]"],
            r"distill.steps = \[65\]: must be rising numbers of steps from 1 to 64",
        ),
        (["--validation.num_inference_steps", "30"], "validation.num_inference_steps = 30 and distill.steps"),
        (["--validation.solver", "heun"], "validation.solver = heun and distill.steps = .*: leave"),
        (["--validation.pab", "[2, 4, 6]"], r"validation.pab = \[2, 4, 6\] and distill.steps"),
        (
            ["--validation.loss_every", "2"],
            "validation.loss_every = 2 and distill.steps = .*no loss on clips",
        ),
        (["--model.depth", "3"], "model.depth = 3: the teacher in init_from = .* has 1"),
    ],
)
def test_bad_settings_are_refused(flags: list[str], message: str, again: Callable[..., list[str]]) -> None:
    with pytest.raises(UserError, match=message):
        do(again(*flags))


def test_the_steps_of_a_student_stay_and_its_score_may_be_trained_otherwise(
    trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    base = ["--init_from", str(tmp_path / "outputs" / "tiny"), "--trainer.steps", "5"]
    run = [*tiny_settings(tmp_path), *FEW, *base]
    for steps in ("[1, 2]", "[]"):
        with pytest.raises(UserError, match="distill.steps .* -> .*it learned something else") as refused:
            do([*run, "--distill.steps", steps])
        assert "init_from" not in str(refused.value)
    assert do([*run, "--distill.score_lr", "3", "--distill.score_updates", "1", "--resume_changed"]) == 0


def test_a_student_continues_conditioning_frames(trained: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    pipe, _ = load_pipeline(trained / "outputs" / "few" / "pipeline")
    found = pipe("a red square", image=Image.fromarray(picture), output_type="np")
    assert found.calls[0].run == 4
    assert (
        np.abs(255 * found.frames[0, 0] - picture).max()
        <= 1
        < np.abs(255 * found.frames[0, 1] - picture).max()
    )
